//! A frame as a trace shows it: its form, and of its values only the kind and length, unless they are permitted.

use serde_json::{Value, json};

/// A larger frame is told by its size.
const MOST: usize = 16 << 10;

pub(super) fn shown(frame: &[u8], permitted: bool) -> Value {
    if frame.len() > MOST {
        return json!(format!("({} bytes, too many to show)", frame.len()));
    }
    // An event stream's frame has its JSON behind `data: `.
    let start = frame.iter().position(|byte| matches!(byte, b'{' | b'[')).unwrap_or(0);
    let mut values = serde_json::Deserializer::from_slice(&frame[start..]).into_iter::<Value>();
    match values.next() {
        Some(Ok(mut value)) => {
            if !permitted {
                mask(&mut value, false);
            }
            value
        }
        _ => json!(format!("({} bytes, no JSON)", frame.len())),
    }
}

/// Everything below a row is a value; what stands around it is ours.
fn mask(value: &mut Value, within: bool) {
    match value {
        Value::Object(map) => {
            map.iter_mut().for_each(|(name, value)| mask(value, within || matches!(name.as_str(), "record" | "old_record")));
        }
        Value::Array(items) => items.iter_mut().for_each(|value| mask(value, within)),
        Value::String(text) if within => *value = json!(format!("text({})", text.chars().count())),
        Value::Number(_) if within => *value = json!("number"),
        Value::Bool(_) if within => *value = json!("boolean"),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn p3_a_row_keeps_its_form_and_loses_its_values() {
        let frame = br#"{"topic":"realtime:a","event":"postgres_changes","payload":{"ids":[7],"data":{"table":"patients","type":"UPDATE",
            "columns":[{"name":"name","type":"text"}],"record":{"id":7,"name":"Ada","well":true,"left":null,"notes":["x",{"y":1}]},
            "old_record":{"id":7}}},"ref":null}"#;
        let masked = shown(frame, false);
        let text = masked.to_string();
        assert!(!text.contains("Ada") && !text.contains("true") && !text.contains("\"x\""), "{text}");
        let data = &masked["payload"]["data"];
        assert_eq!(data["record"]["name"], "text(3)");
        assert_eq!(data["record"]["notes"], json!(["text(1)", { "y": "number" }]));
        assert_eq!(data["record"]["left"], Value::Null);
        assert_eq!(data["old_record"]["id"], "number");
        assert_eq!((&data["table"], &data["columns"][0]["name"]), (&json!("patients"), &json!("name")));
        assert_eq!(shown(frame, true)["payload"]["data"]["record"]["name"], "Ada");
        assert_eq!(shown(b"id: 1/2/3\nevent: change\ndata: {\"record\":{\"a\":\"b\"}}\n\n", false)["record"]["a"], "text(1)");
        assert_eq!(shown(b"retry: 1000", false), json!("(11 bytes, no JSON)"));
    }
}
