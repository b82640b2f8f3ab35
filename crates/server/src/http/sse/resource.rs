//! What a stream listens to, read from its query. Two queries that ask for the same have one name.

use axum::http::{StatusCode, Uri};
use serde_json::json;
use walcast_engine::Asked;

use crate::http::{identity::query_pairs, refusal::Refusal};

pub const PATH: &str = "/sse/v1/changes";

#[derive(Debug, Clone)]
pub struct Resource {
    pub asked: Asked,
    /// `Last-Event-ID` where a header cannot be set.
    pub last_event_id: Option<String>,
    pub ticket: Option<String>,
    /// As the client calls itself.
    pub app: Option<String>,
    pub component: Option<String>,
}

impl Resource {
    pub fn parse(uri: &Uri) -> Result<Resource, Refusal> {
        let mut asked = Asked { event: "*".into(), schema: None, table: None, filter: None, select: None, client_id: 1 };
        let (mut last_event_id, mut ticket, mut app, mut component) = (None, None, None, None);
        for (name, value) in query_pairs(uri) {
            match name.as_str() {
                "table" | "schema" if value.is_empty() => return Err(no_table()),
                "table" => match value.split_once('.') {
                    Some((schema, table)) => (asked.schema, asked.table) = (Some(schema.to_owned()), Some(table.to_owned())),
                    None => asked.table = Some(value),
                },
                "schema" => asked.schema = Some(value),
                "event" => asked.event = event(&value)?,
                "filter" => asked.filter = Some(value),
                "select" => asked.select = Some(value.split(',').map(|column| column.trim().to_owned()).collect()),
                "last_event_id" => last_event_id = Some(value),
                "ticket" => ticket = Some(value),
                "app" => app = Some(value),
                "component" => component = Some(value),
                "apikey" => {}
                other => {
                    return Err(Refusal::new(
                        StatusCode::BAD_REQUEST,
                        "unknown_parameter",
                        format!("there is no parameter `{other}`"),
                    )
                    .hint("use table, schema, event, filter, select"));
                }
            }
        }
        if asked.table.is_none() && asked.schema.is_none() {
            return Err(no_table());
        }
        asked.schema.get_or_insert_with(|| "public".into());
        Ok(Resource { asked, last_event_id, ticket, app, component })
    }

    /// All that decides what is heard: what a ticket is bound to.
    pub fn name(&self) -> String {
        let asked = &self.asked;
        json!([PATH, asked.event, asked.schema, asked.table, asked.filter, asked.select]).to_string()
    }

    /// Table and filter: what a user may listen to only so many times at once.
    pub fn watched(&self) -> String {
        let part = |part: &Option<String>| part.clone().unwrap_or_else(|| "*".into());
        let table = format!("{}.{}", part(&self.asked.schema), part(&self.asked.table));
        match self.asked.filter.as_deref() {
            Some(filter) if !filter.is_empty() => format!("{table}?{filter}"),
            _ => table,
        }
    }
}

fn no_table() -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "no_table", "name a table to listen to")
        .hint("for example /sse/v1/changes?table=patients&filter=id=eq.7")
}

fn event(value: &str) -> Result<String, Refusal> {
    let upper = value.to_ascii_uppercase();
    match upper.as_str() {
        "*" | "INSERT" | "UPDATE" | "DELETE" => Ok(upper),
        _ => Err(Refusal::new(StatusCode::BAD_REQUEST, "unknown_event", format!("there is no event `{value}`"))
            .hint("use INSERT, UPDATE, DELETE or *")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(query: &str) -> Resource {
        Resource::parse(&format!("{PATH}?{query}").parse().unwrap()).unwrap()
    }

    #[test]
    fn queries_that_ask_for_the_same_have_one_name() {
        let one = of("table=vitals&filter=patient_id%3Deq.7&event=insert&apikey=x");
        let other = of("ticket=t&event=INSERT&filter=patient_id=eq.7&table=public.vitals&last_event_id=e");
        assert_eq!(one.name(), other.name());
        assert_eq!(one.watched(), "public.vitals?patient_id=eq.7");
        for different in
            ["table=vitals&event=insert&filter=patient_id=eq.8", "table=vitals&filter=patient_id=eq.7", "schema=vitals"]
        {
            assert_ne!(one.name(), of(different).name(), "{different}");
        }
        assert_ne!(of("table=t&select=a,b").name(), of("table=t&select=a").name());
        assert_eq!(of("schema=ward").watched(), "ward.*");
    }
}
