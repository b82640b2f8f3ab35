//! A tag with placeholders: `reports`, `student:{student_id}`.
//!
//! Read from the header, filled with the parameters as PostgreSQL prints them, so that ` +07` and `7` are one tag.

use walcast_model::Tag;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagTemplate {
    parts: Vec<Part>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Part {
    Text(String),
    /// By its place, from 0.
    Param(usize),
}

impl TagTemplate {
    /// What is wrong, and its mend.
    pub(crate) fn parse(text: &str, params: &[&str]) -> Result<TagTemplate, (String, String)> {
        let wrong = |what: String| (what, "write `-- tags: reports, student:{student_id}`".to_owned());
        let mut parts = Vec::new();
        let mut rest = text;
        while let Some((before, after)) = rest.split_once('{') {
            let (name, tail) = after.split_once('}').ok_or_else(|| wrong(format!("`{text}` has an open brace")))?;
            let place = params.iter().position(|param| *param == name.trim());
            let place = place.ok_or_else(|| {
                let hint = format!("declare it: `-- param: {name} type`, or write the tag without braces");
                (format!("the tag `{text}` names `{name}`, which is no parameter"), hint)
            })?;
            parts.extend([Part::Text(before.to_owned()), Part::Param(place)]);
            rest = tail;
        }
        parts.push(Part::Text(rest.to_owned()));
        parts.retain(|part| *part != Part::Text(String::new()));
        let template = TagTemplate { parts };
        // With values of one letter each: whatever is wrong then is the author's part.
        template.fill(|_| Some("x")).map_err(|error| wrong(format!("`{text}` cannot be a tag: {error}")))?;
        Ok(template)
    }

    pub(crate) fn params(&self) -> impl Iterator<Item = usize> {
        self.parts.iter().filter_map(|part| match part {
            Part::Param(place) => Some(*place),
            Part::Text(_) => None,
        })
    }

    pub(crate) fn fill<'a>(&self, value: impl Fn(usize) -> Option<&'a str>) -> Result<Tag, walcast_model::TagError> {
        let mut text = String::new();
        for part in &self.parts {
            match part {
                Part::Text(part) => text.push_str(part),
                Part::Param(place) => text.push_str(&Tag::escape(value(*place).unwrap_or_default())),
            }
        }
        Tag::parse(&text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_and_cannot_leave_their_place() {
        let template = TagTemplate::parse("student:id={id}:{kind}", &["kind", "id"]).unwrap();
        let values = ["a,b", "7"];
        assert_eq!(template.fill(|place| values.get(place).copied()).unwrap().as_str(), "student:id=7:a%2Cb");
        assert!(TagTemplate::parse("x:{no}", &["id"]).unwrap_err().0.contains("no parameter"));
        assert!(TagTemplate::parse("x:{id", &["id"]).is_err());
        assert!(TagTemplate::parse("~ns:x", &[]).unwrap_err().0.contains("cannot be a tag"));
    }
}
