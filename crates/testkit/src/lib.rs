//! For tests: throw-away PostgreSQL, a socket client, an event-stream client, tokens, a proxy for
//! faults, wait handles. A dev-dependency of every room that talks to a real database or socket.

pub mod mutate;
pub mod postgres;
pub mod proxy;
pub mod realtime_socket;
pub mod sse;
pub mod token;
pub mod wait;

pub use postgres::{TestPostgres, TestPostgresBuilder};
pub use proxy::Proxy;
pub use realtime_socket::{Frame, RealtimeSocket, Refused, Vsn};
pub use sse::{SseEvent, SseStream};
pub use token::jwt;
