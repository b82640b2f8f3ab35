//! Why a command stopped, as a person reads it: one sentence, a code to search for, a hint that mends it.

use crate::settings::SettingsErrors;

#[derive(Debug)]
pub struct Failure {
    problems: Vec<Problem>,
    usage: bool,
}

#[derive(Debug)]
struct Problem {
    code: &'static str,
    message: String,
    hint: Option<String>,
}

impl Failure {
    pub fn new(code: &'static str, message: impl Into<String>) -> Failure {
        Failure { problems: vec![Problem { code, message: message.into(), hint: None }], usage: false }
    }

    /// The caller asked for something that cannot be: exit code 2.
    pub fn usage(code: &'static str, message: impl Into<String>) -> Failure {
        Failure { usage: true, ..Failure::new(code, message) }
    }

    pub fn hint(mut self, hint: impl Into<Option<String>>) -> Failure {
        if let Some(problem) = self.problems.last_mut() {
            problem.hint = hint.into();
        }
        self
    }

    pub fn exit_code(&self) -> u8 {
        if self.usage { 2 } else { 1 }
    }

    /// What goes to stderr.
    pub fn report(&self) -> String {
        let mut text = String::new();
        for problem in &self.problems {
            text.push_str(&format!("error: {} [{}]\n", problem.message, problem.code));
            if let Some(hint) = &problem.hint {
                text.push_str(&format!("  hint: {hint}\n"));
            }
        }
        text
    }
}

impl From<SettingsErrors> for Failure {
    fn from(SettingsErrors(errors): SettingsErrors) -> Failure {
        let problems = errors.into_iter().map(|e| Problem { code: e.code, message: e.message, hint: e.hint }).collect();
        Failure { problems, usage: true }
    }
}
