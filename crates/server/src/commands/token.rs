//! `walcast token`: signs a token for development and prints nothing else. The secret comes from the settings,
//! else from the running `walcast dev`.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use jsonwebtoken::{EncodingKey, Header, encode};
use serde_json::{Map, Value};

use crate::{
    cli::TokenArgs,
    dev_state::{DevState, dev_dir},
    failure::Failure,
    settings::{Settings, parse_duration},
};

pub fn run(settings: Settings, args: TokenArgs) -> Result<ExitCode, Failure> {
    let expires = parse_duration(&args.expires).filter(|time| !time.is_zero()).ok_or_else(|| {
        Failure::usage("wrong_argument", format!("--expires is {:?}, but must be a duration", args.expires))
            .hint("for example: --expires 1h".to_owned())
    })?;
    let claims = claims(&args)?;
    let secret = match settings.auth.jwt_secret {
        Some(secret) => secret.expose().to_owned(),
        None => match running_dev()? {
            Some(dev) => dev.jwt_secret,
            None => return Err(no_secret()),
        },
    };
    println!("{}", mint(&secret, claims, expires)?);
    Ok(ExitCode::SUCCESS)
}

pub(super) fn running_dev() -> Result<Option<DevState>, Failure> {
    DevState::read(&dev_dir(rustix::process::geteuid().is_root()))
}

pub(super) fn no_secret() -> Failure {
    Failure::new("no_secret", "there is no secret to sign with").hint("set WALCAST_JWT_SECRET, or start `walcast dev`".to_owned())
}

/// Signs with HS256; `iat` and `exp` are added here.
pub fn mint(secret: &str, mut claims: Map<String, Value>, expires: Duration) -> Result<String, Failure> {
    // Already installed is as good: an error says only that.
    let _ = jsonwebtoken::crypto::aws_lc::DEFAULT_PROVIDER.install_default();
    let now = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |time| time.as_secs());
    claims.insert("iat".into(), now.into());
    // Rounded up: a token that is dead on arrival helps nobody.
    claims.insert("exp".into(), now.saturating_add(expires.as_millis().div_ceil(1000) as u64).into());
    encode(&Header::default(), &claims, &EncodingKey::from_secret(secret.as_bytes()))
        .map_err(|error| Failure::new("signing", format!("the token cannot be signed: {error}")))
}

fn claims(args: &TokenArgs) -> Result<Map<String, Value>, Failure> {
    let mut claims = Map::new();
    claims.insert("role".into(), args.role.as_str().into());
    if let Some(subject) = &args.sub {
        claims.insert("sub".into(), subject.as_str().into());
    }
    for claim in &args.claims {
        let wrong = |why: &str| {
            Failure::usage("wrong_argument", format!("--claim {claim:?} {why}")).hint("for example: --claim tenant=7".to_owned())
        };
        let (name, text) = claim.split_once('=').ok_or_else(|| wrong("has no `=`"))?;
        match name {
            "" => return Err(wrong("has no name")),
            "role" | "sub" => return Err(wrong(&format!("has a flag of its own: --{name}"))),
            "exp" | "iat" => return Err(wrong("is made from --expires")),
            _ => {}
        }
        let value = serde_json::from_str(text).unwrap_or_else(|_| Value::from(text));
        claims.insert(name.to_owned(), value);
    }
    Ok(claims)
}

#[cfg(test)]
mod tests {
    use super::*;
    use jsonwebtoken::{Algorithm, DecodingKey, Validation, decode};

    fn args(claims: &[&str]) -> TokenArgs {
        let claims = claims.iter().map(|claim| (*claim).to_owned()).collect();
        TokenArgs { role: "authenticated".into(), sub: Some("u1".into()), claims, expires: "1h".into() }
    }

    #[test]
    fn a_token_says_what_was_asked_and_its_signature_holds() {
        let claims = claims(&args(&["tenant=7", "name=Ann Lee", "app={\"a\":[1]}", "code=\"7\"", "x=a=b"])).unwrap();
        let token = mint("secret", claims, Duration::from_secs(60)).unwrap();
        let read = |secret: &str| {
            decode::<Map<String, Value>>(&token, &DecodingKey::from_secret(secret.as_bytes()), &Validation::new(Algorithm::HS256))
        };
        assert!(read("other").is_err());
        let claims = read("secret").unwrap().claims;
        assert_eq!((claims["role"].as_str(), claims["sub"].as_str()), (Some("authenticated"), Some("u1")));
        assert_eq!((&claims["tenant"], &claims["code"], &claims["name"]), (&7.into(), &"7".into(), &"Ann Lee".into()));
        assert_eq!((&claims["app"]["a"][0], &claims["x"]), (&1.into(), &"a=b".into()));
        assert_eq!(claims["exp"].as_u64().unwrap() - claims["iat"].as_u64().unwrap(), 60);
    }

    #[test]
    fn claims_that_make_no_sense_are_refused() {
        for bad in ["tenant", "=7", "role=admin", "sub=x", "exp=5"] {
            assert_eq!(claims(&args(&[bad])).unwrap_err().exit_code(), 2, "{bad}");
        }
    }
}
