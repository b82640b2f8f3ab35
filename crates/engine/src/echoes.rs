//! Those who wrote a message into the WAL and wait until it has come back through the stream.

use std::collections::HashMap;

use parking_lot::Mutex;
use tokio::sync::oneshot;
use walcast_model::Lsn;

#[derive(Default)]
pub struct Echoes {
    waiting: Mutex<HashMap<String, oneshot::Sender<(Lsn, u32)>>>,
}

/// Removes itself when its owner gives up.
pub struct Echo<'a> {
    echoes: &'a Echoes,
    id: String,
    place: oneshot::Receiver<(Lsn, u32)>,
}

impl Echoes {
    /// Listen first, write afterwards.
    pub fn listen(&self, id: &str) -> Echo<'_> {
        let (tell, place) = oneshot::channel();
        self.waiting.lock().insert(id.to_owned(), tell);
        Echo { echoes: self, id: id.to_owned(), place }
    }

    /// Does somebody here wait for it? Then we wrote it.
    pub fn awaits(&self, id: &str) -> bool {
        self.waiting.lock().contains_key(id)
    }

    pub fn came_back(&self, id: &str, lsn: Lsn, index: u32) {
        if let Some(waiting) = self.waiting.lock().remove(id) {
            let _ = waiting.send((lsn, index));
        }
    }
}

impl Echo<'_> {
    /// The message's place in the stream: everything that it invalidates is invalidated.
    pub async fn heard(&mut self) -> Option<(Lsn, u32)> {
        (&mut self.place).await.ok()
    }
}

impl Drop for Echo<'_> {
    fn drop(&mut self) {
        self.echoes.waiting.lock().remove(&self.id);
    }
}
