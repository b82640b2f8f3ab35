//! The registry's own rounds: who is silent is taken out, who leaks is looked for. Started by the engine.

use std::{sync::Arc, time::Duration};

use tokio::time::{MissedTickBehavior, interval};
use tokio_util::sync::CancellationToken;

use super::leaks::LOOKS;
use crate::Core;

const SWEEP: Duration = Duration::from_secs(10);

pub(crate) async fn run(core: Arc<Core>, cancel: CancellationToken) {
    let window = core.config.realtime.leak_window;
    let (mut sweeps, mut looks) = (interval(SWEEP), interval((window / LOOKS as u32).max(Duration::from_millis(1))));
    sweeps.set_missed_tick_behavior(MissedTickBehavior::Delay);
    looks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            () = cancel.cancelled() => return,
            _ = sweeps.tick() => {
                let stale = core.registry.sweep();
                if stale > 0 {
                    tracing::info!(connections = stale, "connections that nothing was heard of for 5 minutes were taken out");
                }
            }
            _ = looks.tick() => core.registry.look_for_leaks(window),
        }
    }
}
