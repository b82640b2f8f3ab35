//! A cursor over one message that checks every length before it believes it.

use std::sync::Arc;

use bytes::Bytes;
use walcast_model::Lsn;

/// Nobody can act on the details but a person, so there is one error; its text carries them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("a pgoutput {message} message is malformed at byte {at}: {fault}")]
pub struct DecodeError {
    pub message: &'static str,
    pub at: usize,
    pub fault: Fault,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    #[error("{wanted} more bytes are announced, but only {left} are left")]
    CutShort { wanted: usize, left: usize },
    #[error("{0} bytes are left over behind its end")]
    LeftOver(usize),
    #[error("a count of {0} is negative")]
    Negative(i64),
    #[error("a name has no end")]
    Unterminated,
    #[error("a name is not UTF-8; the database must be readable with client_encoding UTF8")]
    NotUtf8,
    #[error("flags {0:#04x} are not known in protocol version 1")]
    Flags(u8),
    #[error("tag {0:#04x} is no message of protocol version 1; start the stream with proto_version '1' and no streaming")]
    MessageTag(u8),
    #[error("tag {0:#04x} is not a row image (N, K or O) that may stand here")]
    ImageTag(u8),
    #[error("tag {0:#04x} is not a value (n, u or t)")]
    CellTag(u8),
    #[error("a value is binary; start the stream without the option `binary`")]
    Binary,
    #[error("replica identity {0:#04x} is not known (d, n, f or i)")]
    Identity(u8),
    #[error("the time {0} is out of range")]
    Time(i64),
}

pub(super) struct Reader<'a> {
    data: &'a Bytes,
    at: usize,
    message: &'static str,
}

impl<'a> Reader<'a> {
    pub(super) fn new(data: &'a Bytes) -> Reader<'a> {
        Reader { data, at: 0, message: "unnamed" }
    }

    /// Names the message for errors.
    pub(super) fn of(&mut self, message: &'static str) -> &mut Reader<'a> {
        self.message = message;
        self
    }

    fn left(&self) -> usize {
        self.data.len() - self.at
    }

    fn fault(&self, fault: Fault) -> DecodeError {
        DecodeError { message: self.message, at: self.at, fault }
    }

    /// For a byte that was read and then found wanting.
    pub(super) fn fault_behind(&self, fault: Fault) -> DecodeError {
        DecodeError { message: self.message, at: self.at.saturating_sub(1), fault }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], DecodeError> {
        match self.data[self.at..].first_chunk::<N>() {
            Some(bytes) => {
                self.at += N;
                Ok(*bytes)
            }
            None => Err(self.fault(Fault::CutShort { wanted: N, left: self.left() })),
        }
    }

    pub(super) fn u8(&mut self) -> Result<u8, DecodeError> {
        self.array::<1>().map(|[byte]| byte)
    }

    pub(super) fn u32(&mut self) -> Result<u32, DecodeError> {
        self.array().map(u32::from_be_bytes)
    }

    pub(super) fn u64(&mut self) -> Result<u64, DecodeError> {
        self.array().map(u64::from_be_bytes)
    }

    pub(super) fn lsn(&mut self) -> Result<Lsn, DecodeError> {
        self.u64().map(Lsn)
    }

    /// Version 1 is closed: a flag that it does not define means that we misread.
    pub(super) fn flags(&mut self, known: u8) -> Result<u8, DecodeError> {
        let flags = self.u8()?;
        if flags & !known != 0 {
            return Err(self.fault_behind(Fault::Flags(flags)));
        }
        Ok(flags)
    }

    /// A number of things of at least `each` bytes, which must still fit: so nobody reserves memory for what cannot come.
    pub(super) fn count16(&mut self, each: usize) -> Result<usize, DecodeError> {
        let count = i16::from_be_bytes(self.array()?);
        self.count(i64::from(count), each)
    }

    pub(super) fn count32(&mut self, each: usize) -> Result<usize, DecodeError> {
        let count = i32::from_be_bytes(self.array()?);
        self.count(i64::from(count), each)
    }

    fn count(&self, count: i64, each: usize) -> Result<usize, DecodeError> {
        let wanted = usize::try_from(count).map_err(|_| self.fault(Fault::Negative(count)))?;
        let bytes = wanted.saturating_mul(each);
        if bytes > self.left() {
            return Err(self.fault(Fault::CutShort { wanted: bytes, left: self.left() }));
        }
        Ok(wanted)
    }

    pub(super) fn bytes(&mut self, length: usize) -> Result<Bytes, DecodeError> {
        if length > self.left() {
            return Err(self.fault(Fault::CutShort { wanted: length, left: self.left() }));
        }
        let start = self.at;
        self.at += length;
        Ok(self.data.slice(start..self.at))
    }

    pub(super) fn name(&mut self) -> Result<Arc<str>, DecodeError> {
        let rest = &self.data[self.at..];
        let length = rest.iter().position(|byte| *byte == 0).ok_or_else(|| self.fault(Fault::Unterminated))?;
        let name = std::str::from_utf8(&rest[..length]).map_err(|_| self.fault(Fault::NotUtf8))?;
        self.at += length + 1;
        Ok(name.into())
    }

    pub(super) fn end(&self) -> Result<(), DecodeError> {
        match self.left() {
            0 => Ok(()),
            left => Err(self.fault(Fault::LeftOver(left))),
        }
    }
}
