//! The reference page, written from the table. `walcast config --reference` prints it; a test holds the page in docs to it.

use std::fmt::Write;

use super::{
    table::{NAMESPACE, SETTINGS, Setting},
    tag_rule::TAG_RULE,
};

pub fn reference() -> String {
    let mut page = String::from(
        "<!-- Written by `walcast config --reference`. Change crates/server/src/settings/table.rs, not this page. -->\n\n\
         # Settings\n\n\
         Each setting has a key, an environment variable and a flag. The order is default, file, environment, flag: the last one wins.\n\n\
         * The file is `walcast.toml` in the working directory, or what `--config` or `WALCAST_CONFIG` names.\n\
         * Flags are the key with `-` for `_`: `--cache.l1-bytes 256MiB`. Yes-or-no flags take `=`: `--cache.l2=false`.\n\
         * Secrets can be read from a file: `WALCAST_JWT_SECRET_FILE=/run/secrets/jwt`. One newline at its end is left out.\n\
         * Sizes are `64MiB`, `1GB` or a plain number of bytes; durations are `250ms`, `60s`, `5m`, `1h`, `1d`; lists in the environment are separated by commas.\n\
         * A TTL is a duration from `1s` to `30d`, or `short` (30 s), `medium` (5 min), `long` (1 h), `very_long` (24 h).\n\
         * An empty variable counts as not set. An unknown key, variable or flag is an error.\n\n\
         `walcast config` shows what is in force and where each value comes from.\n",
    );
    let mut section = "";
    for setting in SETTINGS {
        let name = setting.key.split('.').next().unwrap_or_default();
        if name != section {
            section = name;
            let _ = write!(
                page,
                "\n## `[{section}]`\n\n| key | type | default | environment, flag | what it does |\n|---|---|---|---|---|\n"
            );
        }
        let mut forms = format!("`{}`, `--{}`", setting.env(), setting.flag());
        if let Some(short) = setting.short_flag() {
            let _ = write!(forms, ", `--{short}`");
        }
        if setting.secret {
            let _ = write!(forms, ", `{}_FILE`", setting.env());
        }
        let _ = writeln!(page, "| `{}` | {} | {} | {forms} | {} |", setting.key, kind(setting), default(setting), setting.help);
    }
    page.push_str(
        "\n`DATABASE_URL` is read where `WALCAST_DATABASE_URL` is not set.\n\n\
         ## `[cache.namespaces.NAME]`\n\n\
         Only in the file. A namespace that is not named here has the defaults, unless `cache.strict` is true.\n\n\
         | key | type | default | what it does |\n|---|---|---|---|\n",
    );
    for setting in NAMESPACE {
        let _ = writeln!(page, "| `{}` | {} | {} | {} |", setting.key, kind(setting), default(setting), setting.help);
    }
    page.push_str(
        "\n## `[[tags]]`\n\n\
         Only in the file, once for each rule: what a change of a table raises beside the table's and the rows' own tags. \
         [Tags](../guides/tags.md) tells how.\n\n\
         | key | type | default | what it does |\n|---|---|---|---|\n",
    );
    for setting in TAG_RULE {
        let _ = writeln!(page, "| `{}` | {} | {} | {} |", setting.key, kind(setting), default(setting), setting.help);
    }
    page.push_str(
        "\n## An example\n\n```toml\n[server]\nlisten = \"0.0.0.0:4000\"\n\n[cache]\nl1_bytes = \"256MiB\"\n\n\
         [cache.namespaces.patients]\nttl = \"10m\"\nread = [\"authenticated\"]\n\n\
         [cache.namespaces.sessions]\nsource = \"external\"\nttl = \"long\"\n\n\
         [[tags]]\ntable = \"enrolments\"\nraise = [\"student:{student_id}\"]\n```\n",
    );
    page
}

fn kind(setting: &Setting) -> String {
    let secret = if setting.secret { ", secret" } else { "" };
    format!("{}{secret}", setting.kind.name())
}

fn default(setting: &Setting) -> String {
    if setting.default.is_empty() { "–".into() } else { format!("`{}`", setting.default) }
}
