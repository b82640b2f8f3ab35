//! One question to a query: its parameters checked and filled, its page found. What is wrong is said before anything runs.

use std::{collections::HashMap, sync::Arc};

use crate::{
    error::QueryError,
    file::{NamedQuery, Param},
    functions::reads_clock,
    page::{PageAsk, read_cursor},
};

#[derive(Debug, Clone)]
pub struct Question {
    pub query: Arc<NamedQuery>,
    /// The values of $1, $2, …, defaults filled in.
    pub(crate) values: Vec<String>,
    pub(crate) page: Option<PageAsk>,
}

impl Question {
    /// The caller's words. `limit` and `after` choose the page where the query has pages.
    pub fn new(query: Arc<NamedQuery>, params: &HashMap<String, String>) -> Result<Question, QueryError> {
        let page = page(&query, params)?;
        let name = || query.name.clone();
        let known =
            |given: &&String| query.params.iter().any(|param| param.name == **given) || (page.is_some() && reserved(given));
        let mut unknown: Vec<&String> = params.keys().filter(|given| !known(given)).collect();
        unknown.sort();
        if let Some(param) = unknown.first() {
            let known = query.params.iter().map(|param| param.name.clone()).collect();
            return Err(QueryError::UnknownParam { name: name(), param: (*param).clone(), known });
        }
        let values = query.params.iter().map(|param| value(&query, param, params)).collect::<Result<_, _>>()?;
        Ok(Question { query, values, page })
    }

    /// Names and values, defaults filled in.
    pub fn params(&self) -> impl Iterator<Item = (&str, &str)> {
        self.query.params.iter().map(|param| param.name.as_str()).zip(self.values.iter().map(String::as_str))
    }

    /// Is the answer one page of many?
    pub fn is_page(&self) -> bool {
        self.page.is_some()
    }
}

fn reserved(name: &str) -> bool {
    crate::page::RESERVED.contains(&name)
}

fn bad(param: &str, type_name: &str, message: &str) -> QueryError {
    QueryError::BadParam { param: param.to_owned(), type_name: type_name.to_owned(), message: message.to_owned() }
}

fn value(query: &NamedQuery, param: &Param, params: &HashMap<String, String>) -> Result<String, QueryError> {
    let missing =
        || QueryError::MissingParam { name: query.name.clone(), param: param.name.clone(), type_name: param.type_name.clone() };
    let value = params.get(&param.name).or(param.default.as_ref()).cloned().ok_or_else(missing)?;
    if value.contains('\0') {
        return Err(bad(&param.name, &param.type_name, "it holds a zero byte"));
    }
    // `now` as a date would be another day tomorrow, under the same key.
    let moment = ["date", "time"].iter().any(|part| param.type_name.to_ascii_lowercase().contains(part));
    if moment && query.max_age.is_none() && reads_clock(&value) {
        let message = "a word like `now` or `today` means another moment each time; give the moment itself";
        return Err(bad(&param.name, &param.type_name, message));
    }
    Ok(value)
}

fn page(query: &NamedQuery, params: &HashMap<String, String>) -> Result<Option<PageAsk>, QueryError> {
    let Some(page) = &query.page else { return Ok(None) };
    let limit = match params.get("limit") {
        None => page.size,
        Some(text) => text
            .parse()
            .ok()
            .filter(|limit| (1..=query.max_rows).contains(limit))
            .ok_or_else(|| bad("limit", "bigint", &format!("it is not a number from 1 to {}", query.max_rows)))?,
    };
    let read = |text: &String| {
        read_cursor(&query.meaning, page.order.len(), text).ok_or_else(|| QueryError::BadCursor { name: query.name.clone() })
    };
    let after = params.get("after").map(read).transpose()?;
    Ok(Some(PageAsk { limit, after }))
}
