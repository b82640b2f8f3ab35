//! A password that nobody has to type: 192 bits from the kernel, kept in a 0600 file.

use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use crate::error::ClusterError;

/// Hex, so that it needs no quoting in a URL or a shell.
pub(crate) fn generate() -> Result<String, ClusterError> {
    let source = Path::new("/dev/urandom");
    let mut bytes = [0u8; 24];
    File::open(source).and_then(|mut file| file.read_exact(&mut bytes)).map_err(ClusterError::io("reading", source))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

/// Writes a new file that only its owner can read; one that lies there is replaced, not reused,
/// since its mode and owner are not ours to trust.
pub(crate) fn write_secret(path: &Path, secret: &str) -> Result<(), ClusterError> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(ClusterError::io("removing", path)(error)),
        _ => {}
    }
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .and_then(|mut file| writeln!(file, "{secret}"))
        .map_err(ClusterError::io("writing", path))
}
