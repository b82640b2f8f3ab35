//! `walcast serve`: beside a database that has been migrated, until it is told to end.

use std::process::ExitCode;

use tokio::signal::unix::{SignalKind, signal};

use crate::{
    failure::Failure,
    log,
    running::{self, Running},
    settings::Settings,
};

pub async fn run(settings: Settings) -> Result<ExitCode, Failure> {
    log::start(&settings.log);
    let running = running::start(&settings, None).await?;
    tracing::info!(url = %running.url(), "walcast is serving");
    let failed = tokio::select! {
        () = told_to_end() => None,
        () = reload_on_hangup(&running) => None,
        task = running.engine.failed() => Some(task),
    };
    tracing::info!("ending: connections are sent away, then the slot is let go; a second signal ends at once");
    let ended = tokio::select! {
        () = running.drain() => true,
        () = told_to_end() => false,
    };
    if !ended {
        tracing::warn!("told to end again: ending at once");
        return Ok(ExitCode::FAILURE);
    }
    match failed {
        None => Ok(ExitCode::SUCCESS),
        Some(task) => Err(Failure::new("task_died", format!("the task `{task}` died; the log above says why"))
            .hint("start `walcast serve` again: the slot is the log, nothing is lost; and please report this".to_owned())),
    }
}

/// SIGHUP: the query files are read again. A broken one is logged, and the queries stay as they were.
async fn reload_on_hangup(running: &Running) {
    let Ok(mut hangup) = signal(SignalKind::hangup()) else { return std::future::pending().await };
    while hangup.recv().await.is_some() {
        let _ = running.engine.reload_queries().await;
    }
    std::future::pending().await
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
