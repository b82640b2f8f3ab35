//! A table's policies for one role, where they are simple enough to be decided on the row image in memory.
//!
//! [`Policy::compile`] reads what PostgreSQL prints of an expression; whatever it does not know for certain makes the whole
//! not compilable, and PostgreSQL is asked for each row instead. What depends on the caller alone (`auth.uid()`, a claim, a
//! constant) is never interpreted here: PostgreSQL evaluates it, once for each set of claims ([`Policy::bind`]).

mod compile;
mod decide;

use std::{sync::Arc, time::Duration};

use quick_cache::{Weighter, sync::Cache};
use walcast_model::Claims;
use walcast_pg::{Envelope, PgError, Pool};

pub use decide::Answer;

use crate::rules::ColumnRule;

#[derive(Debug)]
pub struct Policy {
    root: Arc<Node>,
    /// SQL that reads nothing but the caller's claims.
    asked: Vec<Asked>,
    /// By the exact claims; it goes with the rules that it was asked for. None: PostgreSQL refuses these claims.
    remembered: Cache<u128, Option<Arc<Bound>>, Weight>,
}

/// What the remembered callers of one policy take.
const REMEMBERED_BYTES: u64 = 8 << 20;

#[derive(Debug, Clone)]
struct Weight;

impl Weighter<u128, Option<Arc<Bound>>> for Weight {
    fn weight(&self, _: &u128, bound: &Option<Arc<Bound>>) -> u64 {
        100 + bound.as_ref().map_or(0, |bound| bound.size_bytes())
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Asked {
    sql: String,
    /// An array, whose elements are meant.
    list: bool,
}

#[derive(Debug, Clone, PartialEq)]
enum Node {
    And(Vec<Node>),
    Or(Vec<Node>),
    Not(Box<Node>),
    /// True or false, never null: `IS TRUE`, `IS FALSE`.
    Is(Box<Node>, bool),
    IsNull(Operand),
    Compare(Operand, Relation, Operand),
    /// `= ANY`, `<> ALL`: equal to one of the list, or to none.
    Among {
        operand: Operand,
        list: Vec<Operand>,
        negated: bool,
    },
    /// A boolean column, or a boolean that the claims give.
    Bool(Operand),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Relation {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    Distinct,
    NotDistinct,
}

#[derive(Debug, Clone, PartialEq)]
enum Operand {
    /// A column by its name, and the family in which it is compared.
    Column(String, walcast_model::Family),
    /// One of [`Policy::asked`].
    Asked(usize),
}

/// A policy with everything that one caller's claims say of it.
#[derive(Debug, Clone)]
pub struct Bound {
    root: Arc<Node>,
    values: Vec<Given>,
}

/// What PostgreSQL answered for one [`Asked`].
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Given {
    /// As `pg_typeof` names it.
    type_name: String,
    /// Null is None; for a list, its elements.
    values: Option<Vec<Option<String>>>,
}

const DOING: &str = "asking what a policy makes of the claims";

impl Policy {
    /// `permissive` are alternatives, `restrictive` must all hold; each as PostgreSQL prints it with an empty search path.
    /// None: at least one of them is beyond what can be decided here.
    pub fn compile(permissive: &[String], restrictive: &[String], columns: &[ColumnRule]) -> Option<Policy> {
        let mut compiler = compile::Compiler::new(columns);
        let holds = |node| Node::Is(Box::new(node), true);
        let mut all = Vec::new();
        if !permissive.is_empty() {
            let any: Option<Vec<Node>> = permissive.iter().map(|text| compiler.expression(text).map(holds)).collect();
            all.push(Node::Or(any?));
        }
        for text in restrictive {
            all.push(holds(compiler.expression(text)?));
        }
        let remembered = Cache::with_weighter(1_000, REMEMBERED_BYTES, Weight);
        Some(Policy { root: Arc::new(Node::And(all)), asked: compiler.asked, remembered })
    }

    /// What these claims make of the policy, asked for once. None: PostgreSQL refuses to evaluate it for them.
    pub async fn bound(&self, pool: &Pool, claims: &Claims, timeout: Duration) -> Result<Option<Arc<Bound>>, PgError> {
        if let Some(bound) = self.remembered.get(&claims.exact()) {
            return Ok(bound);
        }
        let bound = match self.bind(pool, claims, timeout).await {
            Ok(bound) => Some(Arc::new(bound)),
            // A value that cannot be cast, a name that is not there: it will be so next time.
            Err(error) if error.sqlstate().is_some_and(|code| code.starts_with("22") || code.starts_with("42")) => None,
            Err(error) => return Err(error),
        };
        self.remembered.insert(claims.exact(), bound.clone());
        Ok(bound)
    }

    /// Asks PostgreSQL, as the caller, for everything that the claims alone decide.
    pub async fn bind(&self, pool: &Pool, claims: &Claims, timeout: Duration) -> Result<Bound, PgError> {
        if self.asked.is_empty() {
            return Ok(Bound { root: self.root.clone(), values: Vec::new() });
        }
        let parts: Vec<String> = self.asked.iter().map(Asked::question).collect();
        let sql = format!("select {}", parts.join(", "));
        let mut scope = Envelope::new(claims, timeout).setting("search_path", "").open(pool, DOING).await?;
        let rows = scope.client().query_typed(&sql, &[]).await.map_err(PgError::when(DOING));
        scope.end(DOING).await?;
        let rows = rows?;
        let row = rows.first().ok_or_else(|| PgError::Unexpected { doing: DOING, what: "no row".into() })?;
        let given = |at: usize| Given { type_name: row.get(2 * at), values: row.get(2 * at + 1) };
        Ok(Bound { root: self.root.clone(), values: (0..self.asked.len()).map(given).collect() })
    }
}

impl Asked {
    /// Its type, and its value or elements in the text form that the stream uses.
    fn question(&self) -> String {
        let Asked { sql, list } = self;
        let text = |value: &str| format!("case when {value} is null then null else concat({value}) end");
        match list {
            true => format!(
                "pg_typeof({sql})::text, case when ({sql}) is null then null else array(select {} from unnest({sql}) as v(v)) end",
                text("v.v")
            ),
            false => format!("pg_typeof({sql})::text, case when ({sql}) is null then null else array[concat({sql})] end"),
        }
    }
}

impl Bound {
    fn size_bytes(&self) -> u64 {
        let of =
            |given: &Given| given.values.iter().flatten().map(|value| 40 + value.as_ref().map_or(0, String::len)).sum::<usize>();
        self.values.iter().map(|given| 80 + of(given) as u64).sum()
    }
}
