//! `If-None-Match` as RFC 9110 reads it: a list of tags, compared weakly, or `*`.

/// Does the list name this tag, which is quoted and strong?
pub fn matches(list: &[u8], etag: &str) -> bool {
    let mut rest = list.trim_ascii();
    if rest == b"*" {
        return true;
    }
    // A tag may hold a comma, so the list is read tag by tag.
    loop {
        rest = rest.strip_prefix(b"W/").unwrap_or(rest);
        let Some(inner) = rest.strip_prefix(b"\"") else { return false };
        let Some(end) = inner.iter().position(|byte| *byte == b'"') else { return false };
        if &rest[..end + 2] == etag.as_bytes() {
            return true;
        }
        rest = inner[end + 1..].trim_ascii_start();
        match rest.strip_prefix(b",") {
            Some(more) => rest = more.trim_ascii_start(),
            None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_weak_tags_and_the_star() {
        for list in ["\"a\"", "W/\"a\"", "\"x\", \"a\"", "\"x,y\",W/\"a\" , \"z\"", "*", " \"a\" "] {
            assert!(matches(list.as_bytes(), "\"a\""), "{list}");
        }
        for list in ["", "\"b\"", "a", "\"b\" \"a\"", "\"a", "w/\"a\"", "\"x\" , a", "\"a,\""] {
            assert!(!matches(list.as_bytes(), "\"a\""), "{list}");
        }
    }
}
