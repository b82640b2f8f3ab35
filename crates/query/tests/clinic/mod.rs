//! The small clinic on a PostgreSQL of its own, and who asks there.

#![allow(dead_code, reason = "each test file uses its part")]

use std::{collections::HashMap, time::Duration};

use walcast_model::Claims;
use walcast_pg::{ConnectConfig, Pool};
use walcast_query::{Answer, NamedQuery, Plan, Queries, QueryError};
use walcast_testkit::TestPostgres;

pub struct Clinic {
    pub postgres: TestPostgres,
    pub client: tokio_postgres::Client,
    pub pool: Pool,
}

impl Clinic {
    pub async fn open() -> Clinic {
        let postgres = TestPostgres::start().await.unwrap();
        postgres.execute(include_str!("schema.sql")).await.unwrap();
        let client = postgres.connect().await.unwrap();
        let pool = Pool::new(&ConnectConfig::parse(&postgres.url()).unwrap(), 2, Duration::from_secs(10)).unwrap();
        Clinic { postgres, client, pool }
    }

    pub fn queries(&self, files: &[String]) -> Queries {
        let parsed = files.iter().map(|text| NamedQuery::parse("q.sql", text).unwrap()).collect();
        Queries::new(parsed, self.pool.clone(), Duration::from_secs(20), "walcast")
    }

    pub async fn plan(&self, file: &str, role: &str) -> std::sync::Arc<Plan> {
        let queries = self.queries(&[file.to_owned()]);
        let name = queries.all().next().unwrap().name.clone();
        queries.plan(&name, role).await.unwrap()
    }

    pub async fn run(&self, file: &str, claims: &Claims, list: &[(&str, &str)]) -> Result<Answer, QueryError> {
        let queries = self.queries(&[file.to_owned()]);
        let name = queries.all().next().unwrap().name.clone();
        queries.run(&queries.ask(&name, &params(list))?, claims).await.map(|(answer, _)| answer)
    }
}

pub fn params(list: &[(&str, &str)]) -> HashMap<String, String> {
    list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

/// The user with this number.
pub fn user(number: u64) -> String {
    format!("00000000-0000-4000-8000-{number:012}")
}

pub fn claims(role: &str, number: u64) -> Claims {
    let text = format!(r#"{{"role":"{role}","sub":"{}","exp":4102444800,"tenant":"t{}"}}"#, user(number), number % 2);
    Claims::verified(serde_json::from_str(&text).unwrap()).unwrap()
}

pub fn tags(answer: &Answer) -> Vec<String> {
    let mut tags: Vec<String> = answer.tags.iter().map(ToString::to_string).collect();
    tags.sort();
    tags
}
