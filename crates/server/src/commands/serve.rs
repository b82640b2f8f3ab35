//! `walcast serve`: beside a database that has been migrated, until it is told to end.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use crate::{failure::Failure, log, running, settings::Settings};

pub async fn run(settings: Settings) -> Result<ExitCode, Failure> {
    log::start(&settings.log);
    let running = running::start(&settings, None).await?;
    tracing::info!(url = %running.url(), "walcast is serving");
    told_to_end().await;
    tracing::info!("ending: connections are closed, the slot is let go");
    running.stop().await;
    Ok(ExitCode::SUCCESS)
}

/// Ctrl-C, or a service manager's SIGTERM.
pub(super) async fn told_to_end() {
    let terminate = async {
        match signal(SignalKind::terminate()) {
            Ok(mut terminate) => {
                terminate.recv().await;
            }
            Err(_) => std::future::pending().await,
        }
    };
    tokio::select! {
        _ = tokio::signal::ctrl_c() => {}
        () = terminate => {}
    }
}
