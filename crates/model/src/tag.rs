//! The unit of invalidation. One constructor owns form, escaping and hash.
//!
//! | form | raised by | carried by |
//! |---|---|---|
//! | `patients` | every change to `public.patients` | an entry that depends on the table |
//! | `patients:id=7` | a change whose new or old row has `id = 7` | an entry narrowed to those rows |
//! | `patients:id=*` | a change whose old value of `id` is not known, TRUNCATE | the same narrowed entry |
//! | `schema.table…` | as above, outside schema `public` | |
//! | `~ns:NAME`, `~key:NAME:KEY`, `~all` | invalidation by hand | every entry of it |
//! | `product:7` | a rule of the config, or invalidation by hand | the entries that named it |
//! | `product:*` | a rule that cannot tell which, or invalidation by hand | every entry with a tag `product:…` |
//! | anything else | invalidation by hand | the entries that named it |

use std::{fmt, sync::Arc};

use arrayvec::ArrayString;

use crate::{CacheKey, TableName, pg_hash};

/// A tag's place in the clock. Stored hashes depend on [`TagHash::VERSION`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TagHash(pub u64);

impl TagHash {
    /// Part of every checkpoint: raise it when form, escaping or hash function change.
    pub const VERSION: i32 = 2;
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(Arc<str>);

/// What a rule's tag is put together from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TagPiece<'a> {
    /// As it stands.
    Literal(&'a str),
    /// As the stream prints it: escaped.
    Value(&'a str),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TagError {
    #[error("a tag is empty")]
    Empty,
    #[error("tag `{0}…` is longer than {max} bytes", max = Tag::MAX_BYTES)]
    TooLong(String),
    #[error("tag `{0}` holds a control character, a comma or a space at its end; percent-encode it")]
    Character(String),
    #[error("tag `{0}` begins with `~`, which is kept for Walcast's own tags")]
    Reserved(String),
}

impl Tag {
    pub const MAX_BYTES: usize = 256;
    /// Longer values are not narrowed by: their rows are covered by the table tag.
    pub const MAX_VALUE_BYTES: usize = 64;

    pub fn table(table: &TableName) -> Tag {
        let mut text = String::with_capacity(32);
        push_table(&mut text, table);
        Tag(text.into())
    }

    /// `table:column=value`; none if the value is too long to narrow by.
    pub fn row(table: &TableName, column: &str, value: &str) -> Option<Tag> {
        if value.len() > Tag::MAX_VALUE_BYTES {
            return None;
        }
        let mut text = String::with_capacity(48);
        push_table(&mut text, table);
        text.push(':');
        push_escaped(&mut text, column);
        text.push('=');
        push_escaped(&mut text, value);
        Some(Tag(text.into()))
    }

    /// `table:column=*`: rows of the table whose value of the column is not known.
    pub fn any_row(table: &TableName, column: &str) -> Tag {
        let mut text = String::with_capacity(48);
        push_table(&mut text, table);
        text.push(':');
        push_escaped(&mut text, column);
        text.push_str("=*");
        Tag(text.into())
    }

    /// A rule's tag, such as `product:7`; none if a value, or all of it, is too long for a tag.
    pub fn composed<'a>(pieces: impl Iterator<Item = TagPiece<'a>>) -> Option<Tag> {
        let mut text = String::with_capacity(32);
        for piece in pieces {
            match piece {
                TagPiece::Literal(literal) => text.push_str(literal),
                TagPiece::Value(value) if value.len() > Tag::MAX_VALUE_BYTES => return None,
                TagPiece::Value(value) => push_escaped(&mut text, value),
            }
        }
        (text.len() <= Tag::MAX_BYTES).then(|| Tag(text.into()))
    }

    /// `word:*`: whatever a rule would raise under this word.
    pub fn any_of(word: &str) -> Tag {
        Tag(format!("{word}:*").into())
    }

    pub fn namespace(namespace: &str) -> Tag {
        Tag(namespace_parts(namespace).concat().into())
    }

    /// Of what was asked for, so that it drops the entry in every context.
    pub fn key(key: &CacheKey) -> Tag {
        Tag(key_parts(key).concat().into())
    }

    pub fn everything() -> Tag {
        Tag(EVERYTHING.into())
    }

    /// A tag as an application writes it.
    pub fn parse(text: &str) -> Result<Tag, TagError> {
        let shown = || text.chars().take(40).collect::<String>();
        match text {
            "" => Err(TagError::Empty),
            _ if text.len() > Tag::MAX_BYTES => Err(TagError::TooLong(shown())),
            _ if text.starts_with('~') => Err(TagError::Reserved(shown())),
            _ if text.chars().any(|c| c.is_control() || c == ',') || text.trim() != text => Err(TagError::Character(shown())),
            _ => Ok(Tag(text.into())),
        }
    }

    /// A value as it stands within a tag: nothing in it reads as syntax.
    pub fn escape(value: &str) -> String {
        let mut text = String::with_capacity(value.len());
        push_escaped(&mut text, value);
        text
    }

    /// A tag as Walcast itself stored it, from the L2 table or a checkpoint.
    pub fn stored(text: &str) -> Tag {
        Tag(text.into())
    }

    /// The parts of `table:column=value`, still escaped; none for any other form.
    pub fn row_parts(&self) -> Option<(&str, &str, &str)> {
        if self.0.starts_with('~') {
            return None;
        }
        let (table, rest) = self.0.split_once(':')?;
        let (column, value) = rest.split_once('=')?;
        Some((table, column, value))
    }

    /// What the tag names if it is a table's: table, and column and value of a row tag, as the catalog spells them.
    /// None for a tag that could be no table's.
    pub fn names(&self) -> Option<(TableName, Option<(String, String)>)> {
        let (table, row) = match self.row_parts() {
            Some((table, column, value)) => (table, Some((unescape(column)?, unescape(value)?))),
            None => (self.as_str(), None),
        };
        let table = match table.split_once('.') {
            Some((schema, table)) => TableName::new(&unescape(schema)?, &unescape(table)?),
            None => TableName::new("public", &unescape(table)?),
        };
        Some((table, row))
    }

    /// Word and rest of `product:7`; none for any other form.
    pub fn word_parts(&self) -> Option<(&str, &str)> {
        let (word, rest) = self.0.split_once(':')?;
        (!word.starts_with('~') && !rest.contains('=')).then_some((word, rest))
    }

    /// What an entry with this tag must carry too: a row tag also falls with the unknown rows of its column, a rule's tag
    /// with the unknown values of its word.
    pub fn companion(&self) -> Option<Tag> {
        Some(Tag(self.companion_parts()?.concat().into()))
    }

    fn companion_parts(&self) -> Option<[&str; 4]> {
        if let Some((word, rest)) = self.word_parts() {
            return (rest != "*").then_some([word, ":*", "", ""]);
        }
        let (table, column, value) = self.row_parts()?;
        (value != "*").then_some([table, ":", column, "=*"])
    }

    /// `product:*` and `patients:id=*` are raised where a value is unknown, and only then: an entry that carried one
    /// alone would not fall with the values that are known.
    pub fn is_companion(&self) -> bool {
        !self.0.starts_with('~') && (self.0.ends_with(":*") || self.0.ends_with("=*"))
    }

    /// Is this text a value as tags spell it?
    pub fn spells_value(text: &str) -> bool {
        let mut again = String::with_capacity(text.len());
        unescape(text).is_some_and(|value| {
            push_escaped(&mut again, &value);
            again == text
        })
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// In SQL: `hashtextextended(tag collate "C", 0)`.
    pub fn hash(&self) -> TagHash {
        TagHash(pg_hash::hash(self.0.as_bytes(), 0))
    }
}

/// The same as [`Tag::hash`] of tags that nobody needs but for their hash: every entry has some, whichever tier it is from.
impl TagHash {
    /// Of [`Tag::everything`], [`Tag::namespace`] and [`Tag::key`].
    pub fn own(key: &CacheKey) -> [TagHash; 3] {
        [hash_of(&[EVERYTHING]), hash_of(&namespace_parts(key.namespace())), hash_of(&key_parts(key))]
    }

    /// Of [`Tag::companion`].
    pub fn companion(tag: &Tag) -> Option<TagHash> {
        tag.companion_parts().map(|parts| hash_of(&parts))
    }
}

const EVERYTHING: &str = "~all";

fn namespace_parts(namespace: &str) -> [&str; 2] {
    ["~ns:", namespace]
}

fn key_parts(key: &CacheKey) -> [&str; 4] {
    ["~key:", key.namespace(), ":", key.asked()]
}

/// Of the parts' text, which is put together on the stack where it fits.
fn hash_of(parts: &[&str]) -> TagHash {
    let mut text = ArrayString::<128>::new();
    let fits = parts.iter().all(|part| text.try_push_str(part).is_ok());
    TagHash(if fits { pg_hash::hash(text.as_bytes(), 0) } else { pg_hash::hash(parts.concat().as_bytes(), 0) })
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

fn push_table(text: &mut String, table: &TableName) {
    if table.schema() != "public" {
        push_escaped(text, table.schema());
        text.push('.');
    }
    push_escaped(text, table.table());
}

/// Percent-encodes what would be read as syntax: a value with a comma or a colon is still one value.
fn push_escaped(text: &mut String, part: &str) {
    for c in part.chars() {
        match c {
            '%' | ',' | ':' | '=' | '*' | '~' | '.' | ' ' => push_percent(text, c),
            c if c.is_control() => push_percent(text, c),
            c => text.push(c),
        }
    }
}

fn unescape(part: &str) -> Option<String> {
    let mut bytes = Vec::with_capacity(part.len());
    let mut rest = part.as_bytes();
    while let [first, tail @ ..] = rest {
        rest = tail;
        if *first != b'%' {
            bytes.push(*first);
            continue;
        }
        let code = std::str::from_utf8(tail.get(..2)?).ok()?;
        bytes.push(u8::from_str_radix(code, 16).ok()?);
        rest = &tail[2..];
    }
    String::from_utf8(bytes).ok()
}

fn push_percent(text: &mut String, c: char) {
    use fmt::Write;
    let mut bytes = [0; 4];
    for byte in c.encode_utf8(&mut bytes).bytes() {
        let _ = write!(text, "%{byte:02X}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hash_made_without_its_tag_is_the_tag_s_own() {
        for key in ["7".to_owned(), "k".repeat(110), "k".repeat(111), "é".repeat(500)] {
            let asked = CacheKey::new("clinic", &key).unwrap();
            for key in [&asked, &asked.in_context(7)] {
                let tags = [Tag::everything(), Tag::namespace("clinic"), Tag::key(key)];
                assert_eq!(TagHash::own(key), tags.map(|tag| tag.hash()));
            }
        }
        let long = format!("t:{}=7", "c".repeat(200));
        for text in ["patients", "patients:id=7", "patients:id=*", "product:7", "product:*", "~ns:x:y", &long] {
            let tag = Tag::stored(text);
            assert_eq!(TagHash::companion(&tag), tag.companion().map(|companion| companion.hash()), "{text}");
        }
    }

    #[test]
    fn forms() {
        let patients = TableName::new("public", "patients");
        let audit = TableName::new("audit", "log");
        assert_eq!(Tag::table(&patients).as_str(), "patients");
        assert_eq!(Tag::row(&patients, "id", "7").unwrap().as_str(), "patients:id=7");
        assert_eq!(Tag::any_row(&patients, "id").as_str(), "patients:id=*");
        assert_eq!(Tag::row(&audit, "who", "a,b: c").unwrap().as_str(), "audit.log:who=a%2Cb%3A%20c");
        assert_eq!(Tag::row(&patients, "id", "7").unwrap().companion().unwrap(), Tag::any_row(&patients, "id"));
        assert_eq!(Tag::table(&patients).companion(), None);
        assert_eq!(Tag::row(&patients, "name", &"x".repeat(65)), None);
    }

    #[test]
    fn one_keys_tag_is_that_of_its_every_context() {
        let key = CacheKey::new("permission", "me").unwrap();
        assert_eq!(Tag::key(&key), Tag::key(&key.in_context(7)));
        assert_ne!(Tag::key(&key), Tag::key(&CacheKey::new("permission", "you").unwrap()));
    }

    #[test]
    fn a_value_cannot_pass_for_another_tag() {
        let t = TableName::new("public", "t");
        assert_ne!(Tag::row(&t, "a", "*").unwrap(), Tag::any_row(&t, "a"));
        assert_ne!(Tag::table(&TableName::new("a", "b")), Tag::table(&TableName::new("public", "a.b")));
    }

    #[test]
    fn a_rules_tag_falls_with_its_word() {
        let product = |value| Tag::composed([TagPiece::Literal("product:"), TagPiece::Value(value)].into_iter());
        assert_eq!(product("7").unwrap(), Tag::parse("product:7").unwrap());
        assert_eq!(product("7").unwrap().companion().unwrap().as_str(), "product:*");
        assert_eq!(product("*").unwrap().as_str(), "product:%2A", "a value cannot pass for the companion");
        assert_eq!(product("a:b=c").unwrap().companion().unwrap().as_str(), "product:*");
        assert_eq!(product(&"x".repeat(65)), None);
        assert_eq!(Tag::parse("a:b:c").unwrap().companion().unwrap().as_str(), "a:*");
        for (tag, is) in [("product:*", true), ("t:a=*", true), ("product:7", false), ("t:a=1", false), ("product", false)] {
            let tag = Tag::parse(tag).unwrap();
            assert_eq!((tag.is_companion(), tag.companion().is_none() && tag.as_str().contains(':')), (is, is), "{tag}");
        }
        for own in [Tag::everything(), Tag::namespace("n"), Tag::key(&CacheKey::new("n", "k:*").unwrap())] {
            assert!(own.companion().is_none() && !own.is_companion(), "{own}");
        }
    }

    #[test]
    fn a_tag_tells_what_it_names() {
        let log = TableName::new("my.schema", "a log");
        let tag = Tag::row(&log, "e:mail", "ann@example.com").unwrap();
        assert_eq!(tag.names(), Some((log.clone(), Some(("e:mail".into(), "ann@example.com".into())))));
        assert_eq!(Tag::table(&log).names(), Some((log, None)));
        for text in ["100%", "t:a=%zz", "t:a=%é"] {
            assert_eq!(Tag::parse(text).unwrap().names(), None, "{text}");
        }
    }

    #[test]
    fn an_application_writes_the_same_tag_as_the_stream() {
        let patients = TableName::new("public", "patients");
        assert_eq!(Tag::parse("patients:id=7").unwrap(), Tag::row(&patients, "id", "7").unwrap());
        for bad in ["", "a,b", " a", "~all", "a\n"] {
            assert!(Tag::parse(bad).is_err(), "{bad:?}");
        }
        assert!(Tag::parse(&"x".repeat(257)).is_err());
    }
}
