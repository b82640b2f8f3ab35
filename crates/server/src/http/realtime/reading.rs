//! What a client says on its socket, one message at a time. The library reads the protocol; its own answers (pongs, the
//! answer to a close) are collected for the outbox, since nobody but the engine's writers writes to the socket.

use std::io::{self, ErrorKind, Read, Write};

use bytes::Bytes;
use tokio::net::TcpStream;
use tungstenite::{
    Message, Utf8Bytes,
    error::{CapacityError, Error, ProtocolError},
    protocol::{Role, WebSocketConfig, WebSocketContext},
};

pub struct Reading {
    context: Box<WebSocketContext>,
    answers: Vec<u8>,
    budget: usize,
}

pub enum Heard {
    /// Nothing more for now.
    Nothing,
    Text(Utf8Bytes),
    Binary(Bytes),
    Ping,
    Pong(Bytes),
    /// It does not keep to the protocol: the close code and why.
    Wrong(u16, String),
    End,
}

/// Stock clients' frames are smaller; larger ones are read in several steps. Every connection keeps so much.
const BUFFER_BYTES: usize = 1024;
/// Read at a time.
const BUDGET_BYTES: usize = 64 << 10;

impl Reading {
    pub fn new(already_read: Bytes, max_frame_bytes: usize) -> Reading {
        let config = WebSocketConfig::default()
            .read_buffer_size(BUFFER_BYTES)
            .write_buffer_size(0)
            .max_message_size(Some(max_frame_bytes))
            .max_frame_size(Some(max_frame_bytes));
        let context = WebSocketContext::from_partially_read(already_read.into(), Role::Server, Some(config));
        Reading { context: Box::new(context), answers: Vec::new(), budget: BUDGET_BYTES }
    }

    /// So many bytes are read until there is [`Heard::Nothing`], also of a client that sends without a pause.
    pub fn begin(&mut self) {
        self.budget = BUDGET_BYTES;
    }

    pub fn next(&mut self, socket: &TcpStream) -> Heard {
        let mut stream = Wire { socket, answers: &mut self.answers, budget: &mut self.budget };
        loop {
            return match self.context.read(&mut stream) {
                Ok(Message::Text(text)) => Heard::Text(text),
                Ok(Message::Binary(bytes)) => Heard::Binary(bytes),
                Ok(Message::Ping(_)) => Heard::Ping,
                Ok(Message::Pong(bytes)) => Heard::Pong(bytes),
                // The answer is written when more is asked for.
                Ok(Message::Close(_) | Message::Frame(_)) => continue,
                Err(Error::Io(error)) if error.kind() == ErrorKind::WouldBlock => Heard::Nothing,
                Err(Error::Capacity(CapacityError::MessageTooLong { size, max_size })) => {
                    Heard::Wrong(1009, format!("a frame of {size} bytes: at most {max_size} (realtime.max_frame_bytes)"))
                }
                Err(Error::Utf8(_)) => Heard::Wrong(1007, "a text frame that is not UTF-8".into()),
                Err(Error::Protocol(ProtocolError::ResetWithoutClosingHandshake)) => Heard::End,
                Err(Error::Protocol(error)) => Heard::Wrong(1002, error.to_string()),
                Err(_) => Heard::End,
            };
        }
    }

    /// Whole frames that the protocol owes the client.
    pub fn answers(&mut self) -> Option<Bytes> {
        (!self.answers.is_empty()).then(|| std::mem::take(&mut self.answers).into())
    }
}

struct Wire<'a> {
    socket: &'a TcpStream,
    answers: &'a mut Vec<u8>,
    budget: &'a mut usize,
}

impl Read for Wire<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        if *self.budget == 0 {
            // The socket still says that there is more: the task comes back.
            return Err(ErrorKind::WouldBlock.into());
        }
        let count = self.socket.try_read(into)?;
        *self.budget = self.budget.saturating_sub(count);
        Ok(count)
    }
}

impl Write for Wire<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.answers.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
