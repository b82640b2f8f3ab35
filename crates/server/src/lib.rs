//! The front door: HTTP, WebSocket, SSE, commands, settings. A library, so that tests start the server in-process.

pub mod cli;
pub mod commands;
pub mod dev_state;
pub mod failure;
pub mod http;
mod log;
pub mod running;
pub mod settings;
