//! What callers' claims make of the parts of a policy that nothing else decides: PostgreSQL says it, once for a token.
//!
//! Many callers of one role are asked for in one statement: each one's claims are set for its own row, nothing in the
//! question is a sub-select that PostgreSQL would evaluate once for all, and every row echoes the claims it was answered for.

use std::{collections::HashSet, sync::Arc, time::Duration};

use parking_lot::Mutex;
use quick_cache::{Weighter, sync::Cache};
use sqlparser::ast::Expr;
use tokio_postgres::types::Type;
use walcast_model::Claims;
use walcast_pg::{Envelope, PgError, Pool};

use super::caller::bare;

/// SQL that reads nothing but the caller's claims.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    sql: String,
    /// An array, whose elements are meant.
    list: bool,
}

/// What PostgreSQL answered for one [`Asked`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Given {
    /// As `pg_typeof` names it.
    pub type_name: String,
    /// Null is None; for a list, its elements.
    pub values: Option<Vec<Option<String>>>,
}

/// All that a policy wants to know of a caller. Whoever has the same is the same to it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Values(pub Vec<Given>);

/// None: PostgreSQL refuses to evaluate the policy for these claims.
pub type Bound = Option<Arc<Values>>;

#[derive(Debug)]
pub struct Binder {
    asked: Vec<Asked>,
    /// By the exact claims; it goes with the rules that it was asked for.
    remembered: Cache<u128, Bound, Weight>,
    /// Callers that come together are asked for together.
    waiting: Mutex<Vec<Claims>>,
    /// Who asks for those that wait, one at a time.
    turn: tokio::sync::Mutex<()>,
}

/// What the remembered callers of one policy take.
const REMEMBERED_BYTES: u64 = 8 << 20;
/// Callers in one statement.
const TOGETHER: usize = 1_000;

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<u128, Bound> for Weight {
    fn weight(&self, _: &u128, bound: &Bound) -> u64 {
        100 + bound.as_ref().map_or(0, |values| values.size_bytes())
    }
}

impl Values {
    pub fn size_bytes(&self) -> u64 {
        let of =
            |given: &Given| given.values.iter().flatten().map(|value| 40 + value.as_ref().map_or(0, String::len)).sum::<usize>();
        self.0.iter().map(|given| 80 + of(given) as u64).sum()
    }
}

impl Asked {
    /// Its place among `all`, where it is put unless it is there.
    pub fn add(all: &mut Vec<Asked>, expr: &Expr, list: bool) -> usize {
        let asked = Asked { sql: format!("({})", bare(expr)), list };
        all.iter().position(|known| *known == asked).unwrap_or_else(|| {
            all.push(asked);
            all.len() - 1
        })
    }

    /// Its type, and its value in the text form that the stream uses. No sub-select may stand here: PostgreSQL would evaluate
    /// it once for all callers.
    fn question(&self) -> String {
        let sql = &self.sql;
        format!("pg_typeof({sql})::text, case when ({sql}) is null then null else concat({sql}) end")
    }

    fn given(&self, type_name: String, text: Option<String>) -> Given {
        match text {
            None => Given { type_name, values: None },
            Some(text) if !self.list => Given { type_name, values: Some(vec![Some(text)]) },
            Some(text) => match elements(&text) {
                Some(elements) => Given { type_name, values: Some(elements) },
                // Of a type that compares with nothing here: PostgreSQL is asked.
                None => Given { type_name: String::new(), values: Some(vec![Some(text)]) },
            },
        }
    }
}

/// Of an array's text form, `{a,"b c",NULL}`. None for one of several dimensions, or with bounds of its own.
fn elements(text: &str) -> Option<Vec<Option<String>>> {
    let mut rest = text.strip_prefix('{')?.strip_suffix('}')?;
    let mut elements = Vec::new();
    while !rest.is_empty() {
        let quoted = rest.starts_with('"');
        let mut element = String::new();
        let mut chars = rest.char_indices().skip(usize::from(quoted));
        let end = loop {
            match chars.next() {
                None if quoted => return None,
                None => break rest.len(),
                Some((at, '"')) if quoted => break at + 1,
                Some((at, ',')) if !quoted => break at,
                Some((_, '\\')) => element.push(chars.next()?.1),
                Some((_, '{' | '}' | '"')) if !quoted => return None,
                Some((_, c)) => element.push(c),
            }
        };
        elements.push((quoted || !element.eq_ignore_ascii_case("null")).then_some(element));
        rest = &rest[end..];
        match rest.strip_prefix(',') {
            // A comma is followed by another element.
            Some(more) if !more.is_empty() => rest = more,
            Some(_) => return None,
            None if rest.is_empty() => {}
            None => return None,
        }
    }
    Some(elements)
}

const DOING: &str = "asking what a policy makes of the claims";

impl Binder {
    pub fn new(asked: Vec<Asked>) -> Binder {
        let remembered = Cache::with_weighter(1_000, REMEMBERED_BYTES, Weight);
        Binder { asked, remembered, waiting: Mutex::default(), turn: tokio::sync::Mutex::default() }
    }

    /// As far as it was asked for already.
    pub fn known(&self, claims: &Claims) -> Option<Bound> {
        if self.asked.is_empty() {
            return Some(Some(Arc::new(Values(Vec::new()))));
        }
        self.remembered.get(&claims.exact())
    }

    /// For callers of one role, in order. Those not known are asked for together.
    pub async fn bound(&self, pool: &Pool, callers: &[Claims], timeout: Duration) -> Result<Vec<Bound>, PgError> {
        let mut found: Vec<Option<Bound>> = callers.iter().map(|claims| self.known(claims)).collect();
        let missing: Vec<usize> = (0..callers.len()).filter(|at| found[*at].is_none()).collect();
        for some in missing.chunks(TOGETHER) {
            let claims: Vec<Claims> = some.iter().map(|at| callers[*at].clone()).collect();
            for (at, bound) in some.iter().zip(self.bind(pool, &claims, timeout).await?) {
                self.remembered.insert(callers[*at].exact(), bound.clone());
                found[*at] = Some(bound);
            }
        }
        Ok(found.into_iter().map(Option::flatten).collect())
    }

    /// For a caller who will be asked about: whoever comes meanwhile is asked for with the next statement.
    pub async fn prepare(&self, pool: &Pool, claims: &Claims, timeout: Duration) -> Result<(), PgError> {
        if self.known(claims).is_some() {
            return Ok(());
        }
        self.waiting.lock().push(claims.clone());
        let _turn = self.turn.lock().await;
        let mut waiting = std::mem::take(&mut *self.waiting.lock());
        // Nobody, if whoever had the turn before took this one along: it was answered or not.
        let mut seen = HashSet::new();
        waiting.retain(|claims| self.known(claims).is_none() && seen.insert(claims.exact()));
        self.bound(pool, &waiting, timeout).await.map(drop)
    }

    /// One statement, or more where some of the claims are refused. A refusal is one: it will be so next time.
    async fn bind(&self, pool: &Pool, callers: &[Claims], timeout: Duration) -> Result<Vec<Bound>, PgError> {
        let mut parts: Vec<&[Claims]> = vec![callers];
        let mut bound = Vec::with_capacity(callers.len());
        while let Some(part) = parts.pop() {
            match self.ask(pool, part, timeout).await {
                Ok(answered) => bound.extend(answered),
                Err(error) if error.sqlstate().is_some_and(|code| code.starts_with("22") || code.starts_with("42")) => {
                    if let [_, _, ..] = part {
                        let (first, second) = part.split_at(part.len() / 2);
                        parts.extend([second, first]);
                    } else {
                        bound.push(None);
                    }
                }
                Err(error) => return Err(error),
            }
        }
        Ok(bound)
    }

    async fn ask(&self, pool: &Pool, callers: &[Claims], timeout: Duration) -> Result<Vec<Bound>, PgError> {
        let Some(first) = callers.first() else { return Ok(Vec::new()) };
        let unexpected = |what: &str| PgError::Unexpected { doing: DOING, what: what.to_owned() };
        if callers.iter().any(|claims| claims.role() != first.role()) {
            return Err(unexpected("callers of several roles in one question"));
        }
        let texts: Vec<&str> = callers.iter().map(Claims::json).collect();
        let subjects: Vec<&str> = callers.iter().map(|claims| claims.subject().unwrap_or_default()).collect();
        let envelope = Envelope::new(first, timeout).setting("search_path", "").setting("enable_memoize", "off");
        let mut scope = envelope.open(pool, DOING).await?;
        let params: &[(&(dyn tokio_postgres::types::ToSql + Sync), Type)] =
            &[(&texts, Type::TEXT_ARRAY), (&subjects, Type::TEXT_ARRAY)];
        let rows = scope.client().query_typed(&self.statement(), params).await.map_err(PgError::when(DOING));
        scope.end(DOING).await?;
        let mut bound: Vec<Bound> = vec![None; callers.len()];
        for row in rows? {
            let at = usize::try_from(row.get::<_, i64>(0) - 1).unwrap_or(usize::MAX);
            let claims = callers.get(at).ok_or_else(|| unexpected("an answer for nobody"))?;
            let subject = claims.subject().unwrap_or_default();
            if row.get::<_, &str>(1) != claims.json()
                || row.get::<_, &str>(2) != subject
                || row.get::<_, &str>(3) != claims.role()
            {
                return Err(unexpected("the answer belongs to other claims"));
            }
            let given = |(at, asked): (usize, &Asked)| asked.given(row.get(4 + 2 * at), row.get(5 + 2 * at));
            bound[at] = Some(Arc::new(Values(self.asked.iter().enumerate().map(given).collect())));
        }
        match bound.iter().all(Option::is_some) {
            true => Ok(bound),
            false => Err(unexpected("an answer is missing")),
        }
    }

    /// The claims are set as the outer row is made; the inner select reads that row and so is evaluated after it, for each.
    fn statement(&self) -> String {
        let parts: String = self.asked.iter().map(|asked| format!(", {}", asked.question())).collect();
        format!(
            "select walcast_caller.n, walcast_answer.* \
             from unnest($1::text[], $2::text[]) with ordinality as walcast_caller(claims, subject, n) \
             cross join lateral (select set_config('request.jwt.claims', walcast_caller.claims, true) \
               || set_config('request.jwt.claim.sub', walcast_caller.subject, true) as done offset 0) as walcast_set \
             cross join lateral (select current_setting('request.jwt.claims', true), \
               current_setting('request.jwt.claim.sub', true), current_user::text{parts} \
               where walcast_set.done is not null offset 0) as walcast_answer"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::elements;

    #[test]
    fn an_arrays_text_is_its_elements_or_it_is_not_understood() {
        let some = |list: &[&str]| Some(list.iter().map(|one| Some((*one).to_owned())).collect::<Vec<_>>());
        assert_eq!(elements("{}"), some(&[]));
        assert_eq!(elements("{a,b}"), some(&["a", "b"]));
        assert_eq!(elements(r#"{"a,b","","say \"x\" \\","{","NULL"}"#), some(&["a,b", "", r#"say "x" \"#, "{", "NULL"]));
        assert_eq!(elements("{NULL,ü}"), Some(vec![None, Some("ü".into())]));
        for text in ["", "{", "[2:3]={a,b}", "{{a},{b}}", r#"{"a}"#, "{a,}", r#"{"a"b}"#] {
            assert_eq!(elements(text), None, "{text}");
        }
    }
}
