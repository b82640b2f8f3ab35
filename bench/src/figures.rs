//! Numbers for a reader: median and range, percentiles, a table with aligned columns.

/// Several measurements of the same thing.
#[derive(Debug, Clone, Default)]
pub struct Figures(Vec<f64>);

impl Figures {
    pub fn add(&mut self, value: f64) {
        self.0.push(value);
    }

    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// The value that a share of all (0 to 1) does not exceed; not a number if nothing was measured.
    pub fn at(&self, share: f64) -> f64 {
        let sorted = self.sorted();
        let last = sorted.len().saturating_sub(1) as f64;
        sorted.get((share * last).round() as usize).copied().unwrap_or(f64::NAN)
    }

    /// Of an even number of measurements the middle of the two in the middle.
    pub fn median(&self) -> f64 {
        let sorted = self.sorted();
        match sorted.len() {
            0 => f64::NAN,
            count => (sorted[(count - 1) / 2] + sorted[count / 2]) / 2.0,
        }
    }

    fn sorted(&self) -> Vec<f64> {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted
    }

    /// `median (least–most)`.
    pub fn show(&self, decimals: usize) -> String {
        format!("{:.decimals$} ({:.decimals$}–{:.decimals$})", self.median(), self.at(0.0), self.at(1.0))
    }
}

/// Prints a title, a head and rows; the first column is text, the others are numbers.
pub fn table(title: &str, head: &[&str], rows: &[Vec<String>]) {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let line = |cells: &[String]| {
        let padded = cells.iter().zip(&widths).enumerate().map(|(column, (cell, width))| match column {
            0 => format!("{cell:<width$}"),
            _ => format!("{cell:>width$}"),
        });
        println!("  {}", padded.collect::<Vec<_>>().join("  ").trim_end());
    };
    println!("\n{title}");
    line(&head.iter().map(|cell| (*cell).to_owned()).collect::<Vec<_>>());
    rows.iter().for_each(|row| line(row));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_and_the_range_are_of_what_was_measured() {
        let mut figures = Figures::default();
        assert!(figures.median().is_nan(), "nothing measured is no number");
        [5.0, 1.0, 3.0].into_iter().for_each(|value| figures.add(value));
        assert_eq!(figures.show(1), "3.0 (1.0–5.0)");
        assert_eq!((figures.at(0.99), figures.len()), (5.0, 3));
        figures.add(6.0);
        assert_eq!(figures.median(), 4.0, "between the two in the middle");
    }
}
