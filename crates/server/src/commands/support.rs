//! `walcast support`: writes the snapshot of a running server that somebody who helps wants to see.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use super::reach::{Reach, cause, refused};
use crate::{cli::SupportArgs, failure::Failure, settings::Settings};

const PATIENCE: Duration = Duration::from_secs(60);

pub async fn run(settings: Settings, args: SupportArgs) -> Result<ExitCode, Failure> {
    let reach = Reach::new(&settings, args.url.as_deref(), args.token.as_deref())?;
    let away = |error: reqwest::Error| {
        Failure::new("no_server", format!("no server answers at {}{}", reach.base, cause(&error)))
            .hint("start `walcast serve` or `walcast dev`, or name it with --url".to_owned())
    };
    let request = reach.client.get(format!("{}/admin/v1/support", reach.base)).bearer_auth(reach.token()?);
    let response = request.timeout(PATIENCE).send().await.map_err(away)?;
    if !response.status().is_success() {
        return Err(refused(response, "is this the right --url?").await);
    }
    let snapshot: serde_json::Value = response.json().await.map_err(away)?;
    let text = format!("{snapshot:#}\n");
    let path = args.out.unwrap_or_else(named_by_time);
    if path == Path::new("-") {
        print!("{text}");
        return Ok(ExitCode::SUCCESS);
    }
    write(&path, &text).map_err(|error| {
        Failure::new("cannot_write", format!("{} cannot be written: {error}", path.display()))
            .hint("name a new file with --out, or --out - for the terminal".to_owned())
    })?;
    println!("written   {}", path.display());
    if snapshot["people"] == "shown" {
        println!("attention it names people and shows values (realtime.trace_payloads is on)");
    }
    Ok(ExitCode::SUCCESS)
}

fn named_by_time() -> PathBuf {
    let seconds = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    format!("walcast-support-{seconds}.json").into()
}

/// Never over a file that is there; for the owner's eyes.
fn write(path: &Path, text: &str) -> std::io::Result<()> {
    use std::os::unix::fs::OpenOptionsExt;
    let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    file.write_all(text.as_bytes())
}
