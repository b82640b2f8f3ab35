//! Completes the images of a row as far as the stream tells, and no further.

use walcast_model::{Cell, Column, ReplicaIdentity, Row, Table};

use super::AssembleError;
use crate::pgoutput::OldImage;

/// A row must have a cell for each column: a shifted row would give one column's value to another's readers.
pub(super) fn whole(table: &Table, row: Row) -> Result<Row, AssembleError> {
    let (expected, found) = (table.columns.len(), row.0.len());
    if expected != found {
        return Err(AssembleError::Columns { table: table.name.to_string(), expected, found });
    }
    Ok(row)
}

pub(super) fn old(table: &Table, image: OldImage) -> Result<Row, AssembleError> {
    match image {
        OldImage::Full(row) => whole(table, row),
        OldImage::Key(row) => Ok(key_of(table, whole(table, row)?.0.into_iter())),
    }
}

/// Old and new image of an UPDATE.
pub(super) fn update(table: &Table, image: Option<OldImage>, new: Row) -> Result<(Row, Row), AssembleError> {
    let mut new = whole(table, new)?;
    let old = match image {
        Some(image) => old(table, image)?,
        // With FULL the old row always comes. Should it not, its values are not known, and the new ones are no answer.
        None if table.identity == ReplicaIdentity::Full => Row(vec![Cell::Absent; table.columns.len()]),
        // PostgreSQL leaves the key out when it did not change.
        None => key_of(table, new.0.iter().cloned()),
    };
    // "Unchanged" says that the value is the old one, so an old image that has it tells the new one.
    for (new, old) in new.0.iter_mut().zip(&old.0) {
        if *new == Cell::Unchanged && old.is_known() {
            *new = old.clone();
        }
    }
    Ok((old, new))
}

fn key_of(table: &Table, cells: impl Iterator<Item = Cell>) -> Row {
    let keep = |(column, cell): (&Column, Cell)| if column.key { cell } else { Cell::Absent };
    Row(table.columns.iter().zip(cells).map(keep).collect())
}
