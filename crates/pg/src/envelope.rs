//! A read-only transaction as somebody else: role, claims and fixed settings around a few statements.
//!
//! Opening is one round trip; the transaction is rolled back unless it is ended, and a connection whose end is not
//! certain is thrown away, so that nobody's role or claims reach the next borrower.

use std::time::Duration;

use walcast_model::Claims;

use crate::{Lease, PgError, Pool, quote_ident, quote_literal};

#[derive(Debug, Clone)]
pub struct Envelope {
    role: String,
    claims_json: String,
    subject: String,
    timeout: Duration,
    /// Further `set local name = value`.
    settings: Vec<(&'static str, String)>,
}

/// An open envelope. `end` gives the connection back; dropping closes it.
pub struct EnvelopeScope {
    lease: Option<Lease>,
}

impl Envelope {
    pub fn new(claims: &Claims, timeout: Duration) -> Envelope {
        Envelope {
            role: claims.role().to_owned(),
            claims_json: claims.json().to_owned(),
            subject: claims.subject().unwrap_or_default().to_owned(),
            timeout,
            settings: Vec::new(),
        }
    }

    pub fn setting(mut self, name: &'static str, value: impl Into<String>) -> Envelope {
        self.settings.push((name, value.into()));
        self
    }

    /// Every statement of the scope reads the same snapshot.
    pub async fn open(&self, pool: &Pool, doing: &'static str) -> Result<EnvelopeScope, PgError> {
        let lease = pool.lease(doing).await?;
        let mut scope = EnvelopeScope { lease: Some(lease) };
        scope.client().batch_execute(&self.opening()).await.map_err(PgError::when(doing))?;
        Ok(scope)
    }

    fn opening(&self) -> String {
        let mut sql = format!(
            "begin isolation level repeatable read read only; \
             set local statement_timeout = {}; set local row_security = on; set local timezone = 'UTC'; \
             set local datestyle = 'ISO'; set local intervalstyle = 'postgres'; \
             set local extra_float_digits = 1; set local bytea_output = 'hex'; set local search_path = public, extensions; \
             set local \"request.jwt.claims\" = {}; set local \"request.jwt.claim.sub\" = {}; \
             set local \"request.jwt.claim.role\" = {};",
            self.timeout.as_millis().max(1),
            quote_literal(&self.claims_json),
            quote_literal(&self.subject),
            quote_literal(&self.role),
        );
        for (name, value) in &self.settings {
            sql.push_str(&format!("set local {} = {};", quote_ident(name), quote_literal(value)));
        }
        // Last, so that the settings above are made with the login role's rights.
        sql.push_str(&format!("set local role {}", quote_ident(&self.role)));
        sql
    }
}

impl EnvelopeScope {
    pub fn client(&mut self) -> &mut tokio_postgres::Client {
        self.lease.as_mut().expect("the lease is there until end")
    }

    /// Ends the transaction and gives the connection back.
    pub async fn end(mut self, doing: &'static str) -> Result<(), PgError> {
        let Some(lease) = self.lease.take() else { return Ok(()) };
        match lease.batch_execute("rollback").await {
            Ok(()) => Ok(()),
            Err(error) => {
                lease.discard();
                Err(PgError::from_driver(doing, error))
            }
        }
    }
}

impl Drop for EnvelopeScope {
    fn drop(&mut self) {
        if let Some(lease) = self.lease.take() {
            lease.discard();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_cannot_leave_their_quotes() {
        let map = serde_json::from_str(r#"{"role":"a\"b","exp":1,"sub":"x'; reset role; --\\"}"#).unwrap();
        let sql = Envelope::new(&Claims::verified(map).unwrap(), Duration::from_secs(1)).opening();
        assert!(sql.ends_with("set local role \"a\"\"b\""), "{sql}");
        assert!(sql.contains("x''; reset role; --"), "{sql}");
        assert!(!sql.contains("x'; reset"), "{sql}");
    }
}
