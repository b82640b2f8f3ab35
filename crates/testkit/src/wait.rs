//! Waiting for what must become true, with a deadline and a sentence for the one who reads the
//! failure. Never sleeps for luck: it asks again and again, soon at first, then less often.

use std::fmt::Display;
use std::future::Future;
use std::time::Duration;

use anyhow::bail;
use tokio::time::{Instant, sleep};

/// Generous: the machines that run tests are busy.
pub const LONG: Duration = Duration::from_secs(30);

const FIRST_PAUSE: Duration = Duration::from_millis(2);
const LONGEST_PAUSE: Duration = Duration::from_millis(100);

/// Asks until the answer is yes. `what` completes the sentence "waited 30 s until …".
pub async fn until<F, A>(deadline: Duration, what: impl Display, mut ask: F) -> anyhow::Result<()>
where
    F: FnMut() -> A,
    A: Future<Output = bool>,
{
    until_some(deadline, what, || {
        let answer = ask();
        async move { answer.await.then_some(()) }
    })
    .await
}

/// Asks until there is an answer, and hands it over.
pub async fn until_some<F, A, T>(deadline: Duration, what: impl Display, mut ask: F) -> anyhow::Result<T>
where
    F: FnMut() -> A,
    A: Future<Output = Option<T>>,
{
    let end = Instant::now() + deadline;
    let mut pause = FIRST_PAUSE;
    loop {
        match tokio::time::timeout_at(end, ask()).await {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) if Instant::now() < end => {}
            Ok(None) | Err(_) => bail!("waited {deadline:?} until {what}, in vain"),
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[tokio::test(start_paused = true)]
    async fn what_becomes_true_is_noticed_and_what_never_does_is_named() {
        let asked = Cell::new(0);
        until(LONG, "asked three times", || {
            asked.set(asked.get() + 1);
            let yes = asked.get() == 3;
            async move { yes }
        })
        .await
        .unwrap();
        let error = until(LONG, "pigs fly", || async { false }).await.unwrap_err().to_string();
        assert_eq!(error, "waited 30s until pigs fly, in vain");
        let stuck = until(LONG, "the stuck one answers", std::future::pending::<bool>).await.unwrap_err();
        assert!(stuck.to_string().contains("the stuck one answers"), "{stuck}");
    }
}
