//! Bodies of requests while they come in: each for a bounded time, all together within a bounded memory. Stands before every
//! handler; whatever the handler made of a body that was cut off, the caller is told why.
//!
//! Never reads a body itself: what a handler does not ask for is not taken from the socket.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU8, Ordering},
    },
    time::Duration,
};

use axum::{
    body::{Body, Bytes, HttpBody},
    extract::{Request, State},
    http::StatusCode,
    middleware::Next,
    response::{IntoResponse, Response},
};
use futures_util::{Stream, StreamExt, stream};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, timeout_at},
};

use crate::http::refusal::Refusal;

#[derive(Clone)]
pub struct Uploads {
    /// Bytes that may be on their way in.
    room: Arc<Semaphore>,
    time: Duration,
}

impl Default for Uploads {
    /// For the largest batch over a slow line; and for many of them at once.
    fn default() -> Uploads {
        Uploads::new(256 << 20, Duration::from_secs(60))
    }
}

/// Why a body was cut off.
const WHOLE: u8 = 0;
const LATE: u8 = 1;
const FULL: u8 = 2;

impl Uploads {
    fn new(room: usize, time: Duration) -> Uploads {
        Uploads { room: Arc::new(Semaphore::new(room)), time }
    }

    /// The same body until its time or the room is over; then an error, and the reason in `cut`.
    fn bounded<S>(&self, body: S, cut: Arc<AtomicU8>) -> impl Stream<Item = Result<Bytes, axum::Error>> + use<S>
    where
        S: Stream<Item = Result<Bytes, axum::Error>> + Unpin,
    {
        let (room, until) = (self.room.clone(), Instant::now() + self.time);
        // Given back when the body has been read, or its reader is gone.
        let taken: Option<OwnedSemaphorePermit> = None;
        stream::unfold((body, taken, false), move |(mut body, mut taken, over)| {
            let (room, cut) = (room.clone(), cut.clone());
            async move {
                if over {
                    return None;
                }
                let ended = |why: u8, text: &'static str| {
                    cut.store(why, Ordering::Release);
                    Err(axum::Error::new(text))
                };
                let Ok(chunk) = timeout_at(until, body.next()).await else {
                    return Some((ended(LATE, "the body came too slowly"), (body, None, true)));
                };
                let chunk = match chunk? {
                    Ok(chunk) => chunk,
                    Err(error) => return Some((Err(error), (body, None, true))),
                };
                let bytes = u32::try_from(chunk.len()).unwrap_or(u32::MAX);
                match (room.try_acquire_many_owned(bytes), &mut taken) {
                    (Ok(more), Some(taken)) => taken.merge(more),
                    (Ok(more), none) => *none = Some(more),
                    (Err(_), _) => return Some((ended(FULL, "too many bodies at once"), (body, None, true))),
                }
                Some((Ok(chunk), (body, taken, false)))
            }
        })
    }
}

pub async fn bound(State(uploads): State<Uploads>, request: Request, next: Next) -> Response {
    if request.body().is_end_stream() {
        return next.run(request).await;
    }
    let cut = Arc::new(AtomicU8::new(WHOLE));
    let bounded = |body: Body| Body::from_stream(uploads.bounded(body.into_data_stream(), cut.clone()));
    let response = next.run(request.map(bounded)).await;
    let refusal = match cut.load(Ordering::Acquire) {
        LATE => {
            let why = format!("the body did not come within {} s", uploads.time.as_secs());
            Refusal::new(StatusCode::REQUEST_TIMEOUT, "body_too_slow", why).hint("send less at a time, or over a better line")
        }
        FULL => Refusal::new(
            StatusCode::SERVICE_UNAVAILABLE,
            "too_many_bodies",
            "as much is on its way in as memory is set aside for",
        )
        .hint("try again in a moment"),
        _ => return response,
    };
    refusal.into_response()
}

#[cfg(test)]
mod tests {
    use axum::{Router, middleware::from_fn_with_state, routing::put};
    use walcast_testkit::wait;

    use super::*;

    const DEADLINE: Duration = Duration::from_secs(60);

    /// Answers with the length of what came.
    async fn served(uploads: Uploads) -> String {
        let router =
            Router::new().route("/", put(async |body: Bytes| body.len().to_string())).layer(from_fn_with_state(uploads, bound));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, router).await });
        url
    }

    async fn told(url: &str, body: impl Into<reqwest::Body>) -> (u16, String) {
        let answer = reqwest::Client::new().put(url).timeout(DEADLINE).body(body).send().await.unwrap();
        (answer.status().as_u16(), answer.text().await.unwrap())
    }

    /// So many bytes, and then nothing for ever.
    fn unfinished(bytes: usize) -> reqwest::Body {
        let begun = stream::iter([Ok::<_, std::io::Error>(vec![0; bytes])]);
        reqwest::Body::wrap_stream(begun.chain(stream::pending()))
    }

    #[tokio::test]
    async fn p7_a_body_that_never_ends_is_let_go() {
        let url = served(Uploads::new(1 << 20, Duration::from_millis(100))).await;
        assert_eq!(told(&url, "four").await, (200, "4".into()));
        let (status, text) = told(&url, unfinished(4)).await;
        assert!(status == 408 && text.contains("body_too_slow") && text.contains("hint"), "{status} {text}");
    }

    #[tokio::test]
    async fn p7_bodies_on_their_way_in_have_one_bound_together() {
        let uploads = Uploads::new(100, DEADLINE);
        let url = served(uploads.clone()).await;
        let free = async |bytes: usize| {
            wait::until(DEADLINE, format!("{bytes} bytes of room"), async || uploads.room.available_permits() == bytes)
                .await
                .unwrap();
        };
        let slow = tokio::spawn({
            let url = url.clone();
            async move { told(&url, unfinished(80)).await }
        });
        free(20).await;
        let (status, text) = told(&url, vec![0; 50]).await;
        assert!(status == 503 && text.contains("too_many_bodies") && text.contains("hint"), "{status} {text}");
        assert_eq!(told(&url, vec![0; 20]).await.0, 200, "what fits is taken");
        // The client hangs up.
        slow.abort();
        free(100).await;
        assert_eq!(told(&url, vec![0; 100]).await.0, 200, "and the room is there again");
    }
}
