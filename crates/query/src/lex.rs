//! Cuts SQL into the few kinds of token that we look for: words, parameters, literals, symbols.
//!
//! Called where a full parse is not needed or not possible: which functions does this text name (also the texts of
//! EXPLAIN, which are not quite SQL), which parameters, how many statements. Never judges.

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Token {
    /// As PostgreSQL folds it: lower case unless quoted.
    Word {
        text: String,
        quoted: bool,
    },
    Literal(String),
    Param(usize),
    Number,
    Symbol(char),
}

impl Token {
    pub fn is_word(&self, word: &str) -> bool {
        matches!(self, Token::Word { text, quoted: false } if text == word)
    }
}

/// An unterminated literal ends with the text: whoever needs to know lets PostgreSQL say so.
pub fn lex(sql: &str) -> Vec<Token> {
    scan(&sql.chars().collect::<Vec<_>>(), |_, _, _| {})
}

/// The text with each parameter replaced, and nothing else touched.
pub fn replace_params(sql: &str, instead: impl Fn(usize) -> String) -> String {
    let chars: Vec<char> = sql.chars().collect();
    let (mut text, mut copied) = (String::with_capacity(sql.len()), 0);
    scan(&chars, |from, to, number| {
        text.extend(&chars[copied..from]);
        text.push_str(&instead(number));
        copied = to;
    });
    text.extend(&chars[copied..]);
    text
}

fn scan(chars: &[char], mut param: impl FnMut(usize, usize, usize)) -> Vec<Token> {
    let mut tokens = Vec::new();
    let mut at = 0;
    while let Some(&c) = chars.get(at) {
        let next = chars.get(at + 1).copied();
        match c {
            c if c.is_whitespace() => at += 1,
            '-' if next == Some('-') => {
                while chars.get(at).is_some_and(|c| *c != '\n') {
                    at += 1;
                }
            }
            '/' if next == Some('*') => at = after_comment(chars, at),
            '\'' => {
                // E'…' came as the word `e` just before, without a space.
                let escapes =
                    at > 0 && matches!(chars[at - 1], 'e' | 'E') && tokens.last().is_some_and(|t: &Token| t.is_word("e"));
                if escapes || tokens.last().is_some_and(|t| prefix_word(t) && at > 0 && chars[at - 1].is_alphabetic()) {
                    tokens.pop();
                }
                let (text, end) = quoted(chars, at + 1, '\'', escapes);
                tokens.push(Token::Literal(text));
                at = end;
            }
            '"' => {
                let (text, end) = quoted(chars, at + 1, '"', false);
                tokens.push(Token::Word { text, quoted: true });
                at = end;
            }
            '$' if next.is_some_and(|c| c.is_ascii_digit()) => {
                let end = run(chars, at + 1, |c| c.is_ascii_digit());
                let digits: String = chars[at + 1..end].iter().collect();
                let number = digits.parse().unwrap_or(usize::MAX);
                param(at, end, number);
                tokens.push(Token::Param(number));
                at = end;
            }
            '$' => at = dollar(chars, at, &mut tokens),
            c if c.is_ascii_digit() => {
                at = run(chars, at, |c| c.is_alphanumeric() || c == '_' || c == '.');
                tokens.push(Token::Number);
            }
            c if c.is_alphabetic() || c == '_' => {
                let end = run(chars, at, |c| c.is_alphanumeric() || c == '_' || c == '$');
                let text = chars[at..end].iter().collect::<String>().to_ascii_lowercase();
                tokens.push(Token::Word { text, quoted: false });
                at = end;
            }
            c => {
                tokens.push(Token::Symbol(c));
                at += 1;
            }
        }
    }
    tokens
}

fn prefix_word(token: &Token) -> bool {
    ["e", "b", "x", "n"].iter().any(|prefix| token.is_word(prefix))
}

fn run(chars: &[char], from: usize, keep: impl Fn(char) -> bool) -> usize {
    from + chars[from..].iter().take_while(|c| keep(**c)).count()
}

fn after_comment(chars: &[char], from: usize) -> usize {
    let (mut depth, mut at) = (0, from);
    while at < chars.len() {
        match (chars[at], chars.get(at + 1)) {
            ('/', Some('*')) => {
                depth += 1;
                at += 2;
            }
            ('*', Some('/')) => {
                depth -= 1;
                at += 2;
                if depth == 0 {
                    return at;
                }
            }
            _ => at += 1,
        }
    }
    at
}

fn quoted(chars: &[char], from: usize, quote: char, escapes: bool) -> (String, usize) {
    let (mut text, mut at) = (String::new(), from);
    while let Some(&c) = chars.get(at) {
        if c == quote {
            if chars.get(at + 1) != Some(&quote) {
                return (text, at + 1);
            }
            at += 1;
        } else if c == '\\' && escapes {
            at += 1;
        }
        text.extend(chars.get(at));
        at += 1;
    }
    (text, at)
}

fn dollar(chars: &[char], at: usize, tokens: &mut Vec<Token>) -> usize {
    let end = run(chars, at + 1, |c| c.is_alphanumeric() || c == '_');
    if chars.get(end) != Some(&'$') {
        tokens.push(Token::Symbol('$'));
        return at + 1;
    }
    let tag = &chars[at..=end];
    let body = end + 1;
    let close = (body..chars.len()).find(|i| chars[*i..].starts_with(tag));
    tokens.push(Token::Literal(chars[body..close.unwrap_or(chars.len())].iter().collect()));
    close.map_or(chars.len(), |close| close + tag.len())
}

/// Names that stand before an opening parenthesis, with their schema if they have one: every function call,
/// and much that is none.
pub fn names_called(tokens: &[Token]) -> Vec<(Option<String>, String)> {
    let word = |index: usize| match tokens.get(index) {
        Some(Token::Word { text, .. }) => Some(text.clone()),
        _ => None,
    };
    let mut names = Vec::new();
    for (index, token) in tokens.iter().enumerate() {
        let Token::Word { text, .. } = token else { continue };
        if tokens.get(index + 1) == Some(&Token::Symbol('(')) {
            let dotted = index >= 2 && tokens[index - 1] == Token::Symbol('.');
            names.push((if dotted { word(index - 2) } else { None }, text.clone()));
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_parameters_are_replaced() {
        let replaced = replace_params("select $1, '$2', \"$3\", $x$ $4 $x$ -- $5\n, $12::int /* $6 */", |n| format!("<{n}>"));
        assert_eq!(replaced, "select <1>, '$2', \"$3\", $x$ $4 $x$ -- $5\n, <12>::int /* $6 */");
    }

    #[test]
    fn what_is_inside_quotes_and_comments_is_not_code() {
        let sql = "select f(1), 'g(2)', $x$h(3)$x$, E'i\\'(4)' /* j( /* k( */ l( */ -- m(\n, \"N\"(5), s.o ($1)";
        let names: Vec<_> = names_called(&lex(sql)).into_iter().map(|(_, name)| name).collect();
        assert_eq!(names, ["f", "N", "o"]);
        assert_eq!(names_called(&lex("auth.uid()")), [(Some("auth".into()), "uid".into())]);
        assert!(lex(sql).contains(&Token::Param(1)));
        assert!(lex("'it''s'").contains(&Token::Literal("it's".into())));
    }
}
