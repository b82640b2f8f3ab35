//! Named queries in a folder of their own, and raw answers to questions.

use std::path::Path;

use anyhow::{Context, Result};
use serde_json::Value;

use super::Server;

/// Gone with the value.
pub struct QueryDir(tempfile::TempDir);

impl QueryDir {
    pub fn new(files: &[(&str, &str)]) -> Result<QueryDir> {
        let dir = QueryDir(tempfile::tempdir()?);
        files.iter().try_for_each(|(name, text)| dir.write(name, text))?;
        Ok(dir)
    }

    pub fn path(&self) -> &Path {
        self.0.path()
    }

    pub fn setting(&self) -> String {
        self.path().to_string_lossy().into_owned()
    }

    /// `-- name:` is the file's name.
    pub fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.path().join(format!("{name}.sql"));
        std::fs::write(&path, format!("-- name: {name}\n{text}")).with_context(|| path.display().to_string())
    }

    pub fn remove(&self, name: &str) -> Result<()> {
        Ok(std::fs::remove_file(self.path().join(format!("{name}.sql")))?)
    }
}

/// Status, headers and body, as they came.
pub struct Raw {
    pub status: u16,
    pub headers: reqwest::header::HeaderMap,
    pub body: String,
}

impl Raw {
    pub fn header(&self, name: &str) -> &str {
        self.headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default()
    }

    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("{}: {}", self.status, self.body))
    }
}

pub async fn get(server: &Server, token: &str, path: &str, headers: &[(&str, &str)]) -> Result<Raw> {
    let mut request = reqwest::Client::new().get(format!("{}{path}", server.url)).bearer_auth(token);
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    raw(request.send().await?).await
}

pub async fn post(server: &Server, token: &str, path: &str, body: &Value) -> Result<Raw> {
    raw(reqwest::Client::new().post(format!("{}{path}", server.url)).bearer_auth(token).json(body).send().await?).await
}

async fn raw(answer: reqwest::Response) -> Result<Raw> {
    Ok(Raw { status: answer.status().as_u16(), headers: answer.headers().clone(), body: answer.text().await? })
}
