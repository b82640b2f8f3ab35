//! A JSON object, read as a type of ours. A derived reader would take a list of the fields in their order, too.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};

pub struct Object<T>(pub T);

/// The whole text, or why not.
pub fn read<'a, T: Deserialize<'a>>(json: &'a [u8]) -> Result<T, serde_json::Error> {
    serde_json::from_slice(json).map(|Object(read)| read)
}

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(json: D) -> Result<Object<T>, D::Error> {
        json.deserialize_map(OfMap(PhantomData)).map(Object)
    }
}

struct OfMap<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for OfMap<T> {
    type Value = T;

    fn expecting(&self, text: &mut fmt::Formatter<'_>) -> fmt::Result {
        text.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
        T::deserialize(MapAccessDeserializer::new(map))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::value::RawValue;

    use super::*;

    #[derive(Deserialize)]
    struct Two<'a> {
        a: u8,
        #[serde(borrow)]
        b: Option<&'a RawValue>,
    }

    #[test]
    fn an_object_is_read_as_it_stands_and_a_list_of_its_fields_is_none() {
        let two: Two<'_> = read(br#"{"a": 1, "b": [1.0]}"#).unwrap();
        assert_eq!((two.a, two.b.unwrap().get()), (1, "[1.0]"));
        for none in ["[1, 2]", "[]", "null", "7", "\"a\"", "{\"a\": 1} 2"] {
            assert!(read::<Two<'_>>(none.as_bytes()).is_err(), "{none}");
        }
        let list: Result<Vec<Object<Two<'_>>>, _> = serde_json::from_str(r#"[{"a": 1}, [2, 3]]"#);
        assert!(list.is_err_and(|error| error.to_string().contains("expected an object")));
    }
}
