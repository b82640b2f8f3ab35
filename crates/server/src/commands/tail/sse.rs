//! Bytes of an event stream as events. Bounded: an event that does not end is given up.

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct SseEvent {
    pub name: String,
    pub data: String,
    pub id: Option<String>,
}

#[derive(Default)]
pub struct Events {
    buffer: Vec<u8>,
    current: SseEvent,
    /// The data field was there, if only empty: without it there is no event.
    has_data: bool,
}

/// Far above the largest frame that a server sends.
const LONGEST: usize = 64 << 20;

impl Events {
    pub fn push(&mut self, bytes: &[u8]) -> Vec<SseEvent> {
        self.buffer.extend_from_slice(bytes);
        let mut events = Vec::new();
        let mut start = 0;
        while let Some(length) = self.buffer[start..].iter().position(|byte| *byte == b'\n') {
            let line = String::from_utf8_lossy(&self.buffer[start..start + length]).into_owned();
            start += length + 1;
            events.extend(self.line(line.strip_suffix('\r').unwrap_or(&line)));
        }
        self.buffer.drain(..start);
        events
    }

    pub fn overflowed(&self) -> bool {
        self.buffer.len() + self.current.data.len() > LONGEST
    }

    fn line(&mut self, line: &str) -> Option<SseEvent> {
        if line.is_empty() {
            let event = std::mem::take(&mut self.current);
            return std::mem::take(&mut self.has_data).then_some(event);
        }
        let (field, value) = line.split_once(':').unwrap_or((line, ""));
        let value = value.strip_prefix(' ').unwrap_or(value);
        match field {
            "event" => self.current.name = value.to_owned(),
            "id" => self.current.id = Some(value.to_owned()),
            "data" => {
                if self.has_data {
                    self.current.data.push('\n');
                }
                self.has_data = true;
                self.current.data.push_str(value);
            }
            // Comments keep the connection alive.
            _ => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_arrive_whole_however_they_are_cut() {
        let text = b": hello\nevent: live\ndata: {\"position\":\"\xc3\xa9/1/0\"}\r\nid: e/0/1/0\r\n\r\nevent: change\ndata: a\ndata: b\n\nid: 7\n\n";
        for cut in 0..text.len() {
            let mut events = Events::default();
            let mut all = events.push(&text[..cut]);
            all.extend(events.push(&text[cut..]));
            assert_eq!(all.len(), 2, "cut at {cut}");
            assert_eq!((all[0].name.as_str(), all[0].id.as_deref()), ("live", Some("e/0/1/0")));
            assert!(all[0].data.contains('é'));
            assert_eq!(all[1].data, "a\nb");
        }
    }
}
