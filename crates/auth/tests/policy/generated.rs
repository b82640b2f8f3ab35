//! Policies that people write, or might; callers and rows that meet them.

use rand::{Rng, rngs::StdRng, seq::IndexedRandom};
use serde_json::{Value, json};
use walcast_model::Claims;

pub const USERS: [&str; 4] = [
    "00000000-0000-4000-8000-00000000000a",
    "00000000-0000-4000-8000-00000000000b",
    "f0000000-0000-4000-8000-00000000000c",
    "00000000-0000-4000-8000-0000000000ff",
];

const EQUALITY: [&str; 4] = ["=", "<>", "is distinct from", "is not distinct from"];
const ORDER: [&str; 6] = ["=", "<>", "<", "<=", ">", ">="];
const TEXTS: [&str; 8] = [
    "auth.jwt() ->> 'tenant'",
    "(select auth.jwt() ->> 'tenant')",
    "auth.jwt() -> 'app_metadata' ->> 'tenant'",
    "current_setting('request.jwt.claims', true)::json ->> 'tenant'",
    "lower(auth.jwt() ->> 'tenant')",
    "'a'",
    "nullif('', '')",
    "auth.role()",
];
const FLAGS: [&str; 8] =
    ["flag", "not flag", "flag is true", "flag is not true", "flag is false", "flag is null", "flag = false", "flag is unknown"];
/// What PostgreSQL is asked for.
const BEYOND: [&str; 10] = [
    "owner = who()",
    "day < now()",
    "fixed = 'a'",
    "tenant like 'a%'",
    "tenant < 'b'",
    "length(tenant) > 0",
    "tenant = current_user",
    "owner::text = upper(tenant)",
    "n + 1 = 2",
    "day = '2026-01-01'",
];

/// What tables decide.
const TABLES: [&str; 7] = [
    "exists (select 1 from members m where m.tenant = t.tenant and m.who = auth.uid())",
    "exists (select 1 from members m where m.tenant = t.code and m.who = (select auth.uid()))",
    "tenant in (select m.tenant from members m where m.who = (select auth.uid()))",
    "tenant = any (array(select m.tenant from members m where m.who = auth.uid()))",
    "(select count(*) from members m where m.who = (auth.jwt() ->> 'sub')::uuid) > n",
    "exists (select 1 from teams g where g.tenant = t.tenant)",
    "tenant not in (select g.tenant from teams g where g.who = auth.uid())",
];

pub struct Random(pub StdRng);

impl Random {
    fn of<'a>(&mut self, list: &[&'a str]) -> &'a str {
        list.choose(&mut self.0).unwrap()
    }

    fn one_in(&mut self, n: u32) -> bool {
        self.0.random_range(0..n) == 0
    }

    /// A condition that people write, or might.
    fn condition(&mut self, depth: u32) -> String {
        match self.0.random_range(0..if depth > 0 { 27 } else { 21 }) {
            0 | 1 => format!("owner {} auth.uid()", self.of(&EQUALITY)),
            2 => format!("(select auth.uid()) {} owner", self.of(&EQUALITY)),
            3 => format!("tenant {} ({})", self.of(&EQUALITY), self.of(&TEXTS)),
            4 => format!("code {} ({})", self.of(&EQUALITY), self.of(&TEXTS)),
            5 => format!("label {} ({})", self.of(&ORDER), self.of(&TEXTS)),
            6 => format!(
                "n {} {}",
                self.of(&ORDER),
                self.of(&["1", "-3", "2147483647", "3000000000", "(auth.jwt() ->> 'n')::int"])
            ),
            7 => format!("s {} {}", self.of(&ORDER), self.of(&["n", "2", "(auth.jwt() ->> 'n')::bigint"])),
            8 => self.of(&FLAGS).to_owned(),
            9 => format!("{} is {}null", self.of(&["owner", "tenant", "n", "day", "\"Odd name\""]), self.of(&["", "not "])),
            10 => {
                format!(
                    "tenant {}in ('a', 'b', {})",
                    self.of(&["", "not "]),
                    self.of(&["'c'", "null", "auth.jwt() ->> 'tenant'"])
                )
            }
            11 => format!("n {}in (1, 2, null)", self.of(&["", "not "])),
            12 => "tenant = any (string_to_array(auth.jwt() ->> 'tenants', ','))".to_owned(),
            13 => format!("owner::text {} (auth.jwt() ->> 'sub')", self.of(&EQUALITY)),
            14 => "((auth.jwt() ->> 'admin')::boolean)".to_owned(),
            15 => format!("\"Odd name\" {} 'x'", self.of(&EQUALITY)),
            16 => format!("auth.role() = {}", self.of(&["'authenticated'", "'anon'"])),
            17 => self.of(&["true", "false", "null::boolean"]).to_owned(),
            18 => format!("n::text = {}", self.of(&["'1'", "(auth.jwt() ->> 'n')"])),
            19 => self.of(&BEYOND).to_owned(),
            20 => self.of(&TABLES).to_owned(),
            21 | 22 => format!("({} and {})", self.condition(depth - 1), self.condition(depth - 1)),
            23 | 24 => format!("({} or {})", self.condition(depth - 1), self.condition(depth - 1)),
            _ => format!("not ({})", self.condition(depth - 1)),
        }
    }

    pub fn policies(&mut self) -> String {
        let mut sql = String::new();
        for n in 0..self.0.random_range(1..3) {
            let (command, role) = (self.of(&["select", "all"]), self.of(&["authenticated", "public"]));
            sql.push_str(&format!("create policy p{n} on t for {command} to {role} using ({});", self.condition(2)));
        }
        if self.one_in(3) {
            sql.push_str(&format!(
                "create policy r on t as restrictive for select to authenticated using ({});",
                self.condition(1)
            ));
        }
        sql
    }

    fn any(&mut self, list: &[Value]) -> Value {
        list.choose(&mut self.0).unwrap().clone()
    }

    pub fn claims(&mut self) -> Claims {
        let mut map = json!({ "role": "authenticated", "exp": 4_000_000_000_u64 });
        if !self.one_in(6) {
            map["sub"] = json!(self.of(&USERS));
        }
        if !self.one_in(4) {
            map["tenant"] = self.any(&[json!("a"), json!("A"), json!("b"), json!(7), json!(null), json!("")]);
        }
        if self.one_in(2) {
            map["app_metadata"] = json!({ "tenant": self.of(&["a", "b", "c"]) });
        }
        if self.one_in(2) {
            map["n"] = self.any(&[json!(1), json!("2"), json!(-3), json!("x"), json!(null)]);
        }
        if self.one_in(2) {
            map["tenants"] = json!(self.of(&["a,b", "", "c", "A,,b"]));
        }
        if self.one_in(2) {
            map["admin"] = self.any(&[json!(true), json!("yes"), json!("f"), json!(null)]);
        }
        let Value::Object(map) = map else { unreachable!() };
        Claims::verified(map).unwrap()
    }

    pub fn row(&mut self, id: usize) -> String {
        const WORDS: [&str; 7] = ["a", "b", "A", "c", "", "7", "authenticated"];
        let columns: [&[&str]; 10] = [
            &USERS,
            &WORDS,
            &WORDS[..6],
            &["1", "2", "-3", "0", "2147483647"],
            &["1", "2", "-3"],
            &["true", "false"],
            &WORDS,
            &["x", "y"],
            &["a", "ab"],
            &["2026-01-01", "infinity"],
        ];
        let values = columns.map(|list| if self.one_in(5) { "null".to_owned() } else { format!("'{}'", self.of(list)) });
        format!("({id}, {})", values.join(", "))
    }
}
