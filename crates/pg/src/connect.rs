//! A database URL, parsed once: where, who, and with which TLS.
//!
//! `sslmode` means what it means to libpq: `disable`, `prefer` (default), `require` (encrypted, not verified),
//! `verify-ca` and `verify-full` (verified against `sslrootcert` or the system's roots).

use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

use percent_encoding::percent_decode_str;
use rustls::{
    ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    crypto::CryptoProvider,
    pki_types::{CertificateDer, ServerName, UnixTime, pem::PemObject},
};
use tokio_postgres::{Client, Config, config::Host, config::SslMode};
use tokio_postgres_rustls::MakeRustlsConnect;

use crate::PgError;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsMode {
    Disable,
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}

/// Debug and Display never show the password.
#[derive(Clone)]
pub struct ConnectConfig {
    config: Config,
    tls: TlsMode,
    root_certificates: Option<PathBuf>,
}

#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    #[error("the database URL cannot be read: {0}; it looks like postgresql://user:password@host:5432/database")]
    Url(String),
    #[error("sslmode `{0}` is not one of disable, prefer, require, verify-ca, verify-full")]
    SslMode(String),
    #[error("the root certificates in {path} cannot be read: {reason}")]
    Roots { path: String, reason: String },
}

impl ConnectConfig {
    pub fn parse(url: &str) -> Result<ConnectConfig, ConnectError> {
        let (base, query) = url.split_once('?').map_or((url, ""), |(base, query)| (base, query));
        let mut tls = TlsMode::Prefer;
        let mut root_certificates = None;
        let mut kept = Vec::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            match name {
                "sslmode" => tls = TlsMode::parse(value)?,
                "sslrootcert" => {
                    root_certificates = Some(PathBuf::from(percent_decode_str(value).decode_utf8_lossy().into_owned()))
                }
                // Poolers and other drivers use these; they mean nothing here.
                "pgbouncer" | "pool_timeout" | "connection_limit" | "schema" | "channel_binding" | "gssencmode" => {}
                _ => kept.push(pair),
            }
        }
        let url = if kept.is_empty() { base.to_owned() } else { format!("{base}?{}", kept.join("&")) };
        let mut config: Config = url.parse().map_err(|error: tokio_postgres::Error| {
            ConnectError::Url(std::error::Error::source(&error).map_or_else(|| error.to_string(), |cause| cause.to_string()))
        })?;
        if config.get_hosts().is_empty() {
            return Err(ConnectError::Url("it names no host".into()));
        }
        config.ssl_mode(match tls {
            TlsMode::Disable => SslMode::Disable,
            TlsMode::Prefer => SslMode::Prefer,
            _ => SslMode::Require,
        });
        if config.get_connect_timeout().is_none() {
            config.connect_timeout(Duration::from_secs(10));
        }
        if config.get_application_name().is_none() {
            config.application_name("walcast");
        }
        // A peer that is gone without a word is given up in about half a minute, whether we wait for it or it for us.
        config.keepalives_idle(Duration::from_secs(20)).keepalives_interval(Duration::from_secs(5)).keepalives_retries(3);
        config.tcp_user_timeout(Duration::from_secs(30));
        Ok(ConnectConfig { config, tls, root_certificates })
    }

    pub fn tls_mode(&self) -> TlsMode {
        self.tls
    }

    pub fn root_certificates(&self) -> Option<&PathBuf> {
        self.root_certificates.as_ref()
    }

    /// Host (or socket directory), port, user, password, database: what the replication transport needs.
    pub fn parts(&self) -> (String, u16, String, String, String) {
        let host = match self.config.get_hosts().first() {
            Some(Host::Tcp(name)) => name.clone(),
            Some(Host::Unix(path)) => path.to_string_lossy().into_owned(),
            None => "localhost".into(),
        };
        let port = self.config.get_ports().first().copied().unwrap_or(5432);
        let user = self.config.get_user().unwrap_or("postgres").to_owned();
        let password = self.config.get_password().map(|p| String::from_utf8_lossy(p).into_owned()).unwrap_or_default();
        let database = self.config.get_dbname().unwrap_or(&user).to_owned();
        (host, port, user, password, database)
    }

    pub fn user(&self) -> String {
        self.parts().2
    }

    pub(crate) fn driver(&self) -> &Config {
        &self.config
    }

    pub(crate) fn tls(&self) -> Result<MakeRustlsConnect, ConnectError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| ConnectError::Url(error.to_string()))?;
        let config = match self.tls {
            TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => {
                builder.dangerous().with_custom_certificate_verifier(Arc::new(Encrypted(provider))).with_no_client_auth()
            }
            TlsMode::VerifyCa | TlsMode::VerifyFull => builder.with_root_certificates(self.roots()?).with_no_client_auth(),
        };
        Ok(MakeRustlsConnect::new(config))
    }

    fn roots(&self) -> Result<RootCertStore, ConnectError> {
        let mut roots = RootCertStore::empty();
        match &self.root_certificates {
            Some(path) => {
                let wrong = |reason: String| ConnectError::Roots { path: path.display().to_string(), reason };
                for certificate in CertificateDer::pem_file_iter(path).map_err(|e| wrong(e.to_string()))? {
                    roots.add(certificate.map_err(|e| wrong(e.to_string()))?).map_err(|e| wrong(e.to_string()))?;
                }
            }
            None => {
                roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
            }
        }
        Ok(roots)
    }

    /// One connection outside every pool, with its own driver task. Ends when the client is dropped.
    pub async fn connect(&self) -> Result<Client, PgError> {
        const DOING: &str = "connecting";
        let tls = self.tls().map_err(|error| PgError::Unexpected { doing: DOING, what: error.to_string() })?;
        let (client, connection) = self.config.connect(tls).await.map_err(PgError::when(DOING))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "database connection ended");
            }
        });
        Ok(client)
    }
}

impl fmt::Display for ConnectConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (host, port, user, _, database) = self.parts();
        write!(f, "postgresql://{user}@{host}:{port}/{database}")
    }
}

impl fmt::Debug for ConnectConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TlsMode {
    fn parse(text: &str) -> Result<TlsMode, ConnectError> {
        Ok(match text {
            "disable" => TlsMode::Disable,
            "allow" | "prefer" => TlsMode::Prefer,
            "require" => TlsMode::Require,
            "verify-ca" => TlsMode::VerifyCa,
            "verify-full" => TlsMode::VerifyFull,
            other => return Err(ConnectError::SslMode(other.to_owned())),
        })
    }
}

/// `sslmode=require`: encrypted, but the server's certificate is taken as it is, as libpq does.
#[derive(Debug)]
struct Encrypted(Arc<CryptoProvider>);

impl ServerCertVerifier for Encrypted {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, certificate, signed, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_read_and_its_password_never_shown() {
        let c = ConnectConfig::parse("postgresql://ann:s3cret@db.example:6543/app?sslmode=verify-full&pgbouncer=true").unwrap();
        assert_eq!(c.tls_mode(), TlsMode::VerifyFull);
        assert_eq!(c.parts(), ("db.example".into(), 6543, "ann".into(), "s3cret".into(), "app".into()));
        assert_eq!(format!("{c} {c:?}").matches("s3cret").count(), 0);
    }

    #[test]
    fn mistakes_are_named() {
        assert!(ConnectConfig::parse("postgresql://u@h/d?sslmode=yes").unwrap_err().to_string().contains("sslmode `yes`"));
        assert!(ConnectConfig::parse("mysql://u@h/d").is_err());
        assert!(ConnectConfig::parse("postgresql:///d").is_err());
    }
}
