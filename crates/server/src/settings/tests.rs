//! Settings as an operator meets them: right, wrong, misspelt and secret.

use walcast_engine::{
    NamespaceConfig, Policy,
    config::{Context, Grant},
    model::Tag,
};

use super::*;

fn inputs() -> (tempfile::TempDir, Inputs) {
    let directory = tempfile::tempdir().unwrap();
    let inputs = Inputs { directory: directory.path().to_owned(), ..Inputs::default() };
    (directory, inputs)
}

fn with(file: Option<&str>, env: &[(&str, &str)], flags: &[(&str, &str)]) -> Result<Loaded, SettingsErrors> {
    let (directory, mut inputs) = inputs();
    if let Some(text) = file {
        std::fs::write(directory.path().join("walcast.toml"), text).unwrap();
    }
    let owned = |pairs: &[(&str, &str)]| pairs.iter().map(|(a, b)| ((*a).to_owned(), (*b).to_owned())).collect();
    inputs.env = owned(env);
    inputs.flags = owned(flags);
    load(&inputs)
}

/// The one error, as text with its hint.
fn error(file: Option<&str>, env: &[(&str, &str)], flags: &[(&str, &str)]) -> String {
    let SettingsErrors(errors) = with(file, env, flags).unwrap_err();
    assert_eq!(errors.len(), 1, "{errors:?}");
    format!("{} | {}", errors[0].message, errors[0].hint.clone().unwrap_or_default())
}

#[test]
fn without_anything_there_are_the_defaults() {
    let settings = with(None, &[("PATH", "/bin")], &[]).unwrap().settings;
    assert_eq!(settings.server.listen.to_string(), "127.0.0.1:4000");
    assert_eq!(settings.cache.l1_bytes, 64 << 20);
    assert_eq!(settings.realtime.max_frame_bytes, 5_000_000);
    assert_eq!(settings.auth.allowed_roles, ["anon", "authenticated", "service_role"]);
    assert_eq!((settings.cache.deaf, settings.cache.l2, settings.cache.strict), (Deaf::Stale, true, false));
    assert!(settings.database.url.is_none() && settings.queries.dir.is_none());
}

#[test]
fn every_key_of_the_table_is_a_field_and_every_example_is_valid() {
    let mut resolved = Resolved::default();
    for setting in table::SETTINGS {
        let text = if setting.default.is_empty() { setting.example } else { setting.default };
        for text in [text, setting.example] {
            let value = setting.kind.parse(&value::Raw::Text(text.into()));
            resolved.0.insert(setting.key, value.unwrap_or_else(|| panic!("{}: {text}", setting.key)));
        }
    }
    Settings::from_resolved(&mut resolved, BTreeMap::new());
    assert!(resolved.0.is_empty(), "not read by Settings: {:?}", resolved.0.keys());
    for setting in table::NAMESPACE {
        let texts = [setting.default, setting.example].into_iter().filter(|text| !text.is_empty());
        texts.for_each(|text| assert!(setting.kind.parse(&value::Raw::Text(text.into())).is_some(), "{}: {text}", setting.key));
    }
}

#[test]
fn flag_beats_environment_beats_file_beats_default() {
    let file = "[cache]\nl1_bytes = \"1MiB\"\nl2 = false\nmax_staleness = \"9s\"\n";
    let env = [("WALCAST_CACHE__L1_BYTES", "2MiB"), ("WALCAST_CACHE__L2", "true")];
    let loaded = with(Some(file), &env, &[("cache.l1_bytes", "3000")]).unwrap();
    assert_eq!(loaded.settings.cache.l1_bytes, 3000);
    assert!(loaded.settings.cache.l2);
    assert_eq!(loaded.settings.cache.max_staleness, Duration::from_secs(9));
    let origin = |key: &str| loaded.effective.iter().find(|e| e.key == key).unwrap().origin.clone();
    assert_eq!(origin("cache.l1_bytes"), "flag --cache.l1-bytes");
    assert_eq!(origin("cache.l2"), "environment variable WALCAST_CACHE__L2");
    assert_eq!(origin("cache.max_staleness"), "walcast.toml line 4");
    assert_eq!(origin("log.level"), "default");
}

#[test]
fn fixed_names_and_the_platforms_database_url() {
    let url = |env: &[(&str, &str)]| with(None, env, &[]).unwrap().settings.database.url.map(|url| url.expose().to_owned());
    assert_eq!(url(&[("DATABASE_URL", "postgres://a")]).as_deref(), Some("postgres://a"));
    assert_eq!(
        url(&[("DATABASE_URL", "postgres://a"), ("WALCAST_DATABASE_URL", "postgres://b")]).as_deref(),
        Some("postgres://b")
    );
    assert_eq!(url(&[("WALCAST_DATABASE_URL", "")]), None);
    let settings = with(None, &[("WALCAST_LISTEN", "0.0.0.0:1"), ("WALCAST_JWT_SECRET", "s")], &[]).unwrap().settings;
    assert_eq!((settings.server.listen.port(), settings.auth.jwt_secret.unwrap().expose()), (1, "s"));
    let both = error(None, &[("WALCAST_LISTEN", "0.0.0.0:1"), ("WALCAST_SERVER__LISTEN", "0.0.0.0:2")], &[]);
    assert!(both.contains("both set `server.listen`"), "{both}");
}

#[test]
fn a_secret_comes_from_a_file_without_its_last_newline() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), "s3cret \n\n").unwrap();
    let path = file.path().to_str().unwrap();
    let settings = with(None, &[("WALCAST_JWT_SECRET_FILE", path)], &[]).unwrap().settings;
    assert_eq!(settings.auth.jwt_secret.unwrap().expose(), "s3cret");
    let missing = error(None, &[("WALCAST_JWT_SECRET_FILE", "/nowhere/secret")], &[]);
    assert!(missing.contains("WALCAST_JWT_SECRET_FILE") && missing.contains("/nowhere/secret"), "{missing}");
    // Only secrets have the form.
    assert!(error(None, &[("WALCAST_LOG__LEVEL_FILE", path)], &[]).contains("did you mean `WALCAST_LOG__LEVEL`?"));
}

#[test]
fn secrets_are_never_shown() {
    let env = [("WALCAST_JWT_SECRET", "hunter2"), ("DATABASE_URL", "postgres://u:hunter2@h/d")];
    let loaded = with(None, &env, &[]).unwrap();
    assert!(!format!("{loaded:?}").contains("hunter2"));
    let wrong = error(None, &[("WALCAST_DATABASE_URL", "mysql://u:hunter2@h/d")], &[]);
    assert!(!wrong.contains("hunter2") && wrong.contains("postgresql://"), "{wrong}");
    assert!(!error(Some("[database]\nurl = 'mysql://hunter2'"), &[], &[]).contains("hunter2"));
}

#[test]
fn what_is_misspelt_is_named_with_its_place_and_what_was_meant() {
    for (file, place, meant) in [
        ("[cache]\n\nl1_byte = 5\n", "walcast.toml line 3: there is no setting `cache.l1_byte`", "`cache.l1_bytes`"),
        ("[chache]\nl2 = true\n", "line 2", "`cache.l2`"),
        ("[databse]\n", "line 1", "database."),
        ("listen = '127.0.0.1:1'", "line 1", ""),
        ("[cache.namespaces.a]\nttl = '5s'\nrole = ['x']\n", "line 3: there is no setting `cache.namespaces.a.role`", "`read`"),
        ("[cache.namespaces.a]\nroles = ['x']\n", "line 2: there is no setting `cache.namespaces.a.roles`", "`read`"),
        ("[cache.namespaces.a]\nrefresh = '80%'\n", "line 2", "`refresh_ahead`"),
        ("[cache.namespaces.'query.ward']\nttl = '5s'\n", "line 2: namespace `query.ward` belongs to a query", "-- ttl: 5m"),
        ("[cache.namespaces]\na = 5\n", "line 2", ""),
        ("[cache.namespaces.'a b']\nttl = '5s'\n", "cannot name a cache namespace", "a-z"),
        ("[[tags]]\ntable = 'a'\nraise = ['s:{x}']\n\nrase = ['s:{x}']\n", "line 5: there is no setting `tags.rase`", "`raise`"),
        ("tags = ['a']\n", "line 1", "[[tags]]"),
        ("[[tags]]\nraise = ['s:{x}']\n", "line 2: a rule for tags has no `table`", "table ="),
        ("[[tags]]\ntable = 'a'\n", "line 2: a rule for tags has no `raise`", "raise ="),
        ("[[tags]]\ntable = 'a'\nraise = ['s']\n", "line 3: `s` does not begin with a word", "student:{student_id}"),
        ("[[tags]]\ntable = 'a'\nraise = 5\n", "line 3: `tags.raise` is 5, but must be a list", "student"),
        (
            "[[tags]]\ntable = 'a'\non = ['upsert']\nraise = ['s:{x}']\n",
            "line 3: `upsert` is no operation",
            "insert, update, delete",
        ),
        ("[[tags]]\ntable = 'a'\ncascade = 'select 1'\nraise = ['s:{x}']\n", "line 3: a cascade needs `with`", "with ="),
        ("[[tags]]\ntable = 'a'\nwith = ['b']\nraise = ['s:{x}']\n", "line 3: `with` belongs to a `cascade`", "cascade ="),
    ] {
        let error = error(Some(file), &[], &[]);
        assert!(error.contains(place) && error.contains(meant), "{file:?}: {error}");
    }
    let env = error(None, &[("WALCAST_CACHE_L1_BYTES", "5")], &[]);
    assert!(env.contains("did you mean `WALCAST_CACHE__L1_BYTES`?"), "{env}");
    assert!(error(None, &[("WALCAST_JWT_SECRT", "5")], &[]).contains("`WALCAST_JWT_SECRET`"));
}

#[test]
fn variables_of_the_process_are_no_settings() {
    let env = [
        ("WALCAST_PG_BIN", "x"),
        ("WALCAST_DEV_DIR", "x"),
        ("WALCAST_TEST_PG_BIN", "x"),
        ("WALCAST_LOG", "debug"),
        ("OTHER_X", "y"),
    ];
    assert!(with(None, &env, &[]).is_ok());
}

#[test]
fn a_wrong_value_says_what_is_expected_with_an_example() {
    for (key, value, expected) in [
        ("cache.l1_bytes", "64 apples", "a size"),
        ("cache.l1_bytes", "0", "a size"),
        ("cache.default_ttl", "5", "a duration"),
        ("cache.default_ttl", "0s", "a duration"),
        ("cache.default_ttl", "shortest", "short, medium"),
        ("cache.l2", "maybe", "true or false"),
        ("cache.deaf", "panic", "one of stale, compute"),
        ("database.max_connections", "6", "from 7 to 10000"),
        ("database.max_connections", "-1", "whole number"),
        ("database.slot", "My Slot", "a-z, 0-9"),
        ("server.listen", "localhost", "an IP address and a port"),
        ("server.listen", "4000", "an IP address and a port"),
        ("auth.allowed_roles", "anon,,x", "a list"),
        ("log.level", "walcast=loud", "a level"),
        ("log.format", "xml", "one of text, json"),
    ] {
        let error = error(None, &[], &[(key, value)]);
        assert!(error.contains(expected) && error.contains(value) && error.contains("for example"), "{key}={value}: {error}");
    }
    for (file, expected) in [
        ("[cache]\nl2 = 'perhaps'", "line 2"),
        ("[cache]\ndefault_ttl = 5", "`cache.default_ttl` is 5, but must be short, medium"),
        ("[cache]\nl1_bytes = 1.5", "a number with a fraction"),
        ("[auth]\nallowed_roles = ['a', 5]", "an array of other things"),
        ("[auth]\nallowed_roles = 1979-05-27", "a date"),
        ("[cache\nl2 = true", "not TOML"),
        ("[cache]\nl2 = true\nl2 = false", "line 3"),
        ("[database.url]\nhost = 'x'", "database.url"),
    ] {
        assert!(error(Some(file), &[], &[]).contains(expected), "{file}: {}", error(Some(file), &[], &[]));
    }
}

#[test]
fn all_mistakes_are_told_at_once() {
    let file = "[cache]\nl1 = 5\n[log]\nformat = 'xml'\n";
    let SettingsErrors(errors) = with(Some(file), &[("WALCAST_X", "1")], &[("cache.l2", "x")]).unwrap_err();
    assert_eq!(errors.len(), 4, "{errors:?}");
}

#[test]
fn namespaces_are_read_from_the_file() {
    let file = "[cache]\nl1_bytes = '100MB'\n\
                [cache.namespaces.patients]\nttl = '10m'\nread = ['authenticated', 'claim:app_role=nurse']\nwrite = ['backend']\n\
                tags = ['patients', 'ward:7']\npolicy = 'lfu'\nshare = '20%'\nttl_jitter = '25%'\nrefresh_ahead = '80%'\n\
                grace = '1h'\nstale_while_revalidate = 'short'\nnegative_ttl = '5s'\nserve_stale = true\n\
                [cache.namespaces.sessions]\nsource = 'external'\nttl = 'very_long'\nper_context = true\nshare = '16MiB'\n\
                [cache.namespaces.permissions]\nper_context = true\ncontext = ['sub', 'app_metadata.tenant']\n\
                [cache.namespaces.plain]\n";
    let namespaces = with(Some(file), &[], &[]).unwrap().settings.cache.namespaces;
    let seconds = Duration::from_secs;
    let patients = NamespaceConfig {
        ttl: Some(seconds(600)),
        ttl_jitter: 0.25,
        external: false,
        policy: Policy::Lfu,
        l1_bytes: Some(20_000_000),
        tags: vec![Tag::parse("patients").unwrap(), Tag::parse("ward:7").unwrap()],
        grace: seconds(3600),
        stale_while_revalidate: seconds(30),
        refresh_ahead: Some(0.8),
        negative_ttl: Some(seconds(5)),
        serve_invalidated: true,
    };
    assert_eq!(namespaces["patients"].entries, patients);
    let text = |grants: &[Grant]| grants.iter().map(ToString::to_string).collect::<Vec<_>>();
    assert_eq!(text(&namespaces["patients"].read), ["authenticated", "claim:app_role=nurse"]);
    assert_eq!(text(&namespaces["patients"].write), ["backend"]);
    assert!(namespaces["patients"].invalidate.is_empty() && namespaces["patients"].context.is_none());
    let sessions = &namespaces["sessions"];
    assert!(sessions.entries.external && sessions.context == Some(Context::AllClaims));
    assert_eq!((sessions.entries.ttl, sessions.entries.l1_bytes), (Some(seconds(86_400)), Some(16 << 20)));
    let claims = Context::Claims(vec!["sub".into(), "app_metadata.tenant".into()]);
    assert_eq!(namespaces["permissions"].context, Some(claims));
    assert_eq!(namespaces["plain"], NamespaceSettings::default());
}

#[test]
fn a_namespace_that_contradicts_itself_is_refused_with_line_and_mend() {
    for (lines, why, mend) in [
        ("ttl = '31d'", "line 3: `cache.namespaces.n.ttl` is \"31d\"", "ttl = "),
        ("ttl = '900ms'", "from 1s to 30d", "ttl = "),
        ("tags = ['~all']", "line 3: `cache.namespaces.n.tags`: tag `~all` begins with `~`", "tags = "),
        ("tags = ['a,b']", "percent-encode", "tags = "),
        ("read = ['claim:app_role']", "`cache.namespaces.n.read`: `claim:app_role`: a role is a name", "claim:app_role=nurse"),
        ("write = ['claim:user_metadata.role=admin']", "users write `user_metadata` themselves", "write = "),
        ("context = ['sub']", "line 3: `cache.namespaces.n.context`", "add per_context = true"),
        ("per_context = true\ncontext = ['jti']", "line 4: `cache.namespaces.n.context`: `jti` differs", "sub"),
        ("per_context = true\nserve_stale = true", "line 4: `cache.namespaces.n.serve_stale`", "leave out"),
        ("share = '120%'", "a share from", "share = "),
        ("refresh_ahead = '5%'", "from \"10%\" to \"99%\"", "80%"),
        ("policy = 'mru'", "one of adaptive, lru, lfu, fifo", "policy = "),
        (
            "share = '1KB'\n[cache.namespaces.m]\nshare = '9MB'",
            "line 5: the shares of all namespaces (m 9000000, n 1000)",
            "raise cache.l1_bytes",
        ),
    ] {
        // The largest value is 1 MiB and must find room beside the shares.
        let file = format!("cache.l1_bytes = '10MB'\n[cache.namespaces.n]\n{lines}\n");
        let error = error(Some(&file), &[], &[]);
        assert!(error.contains(why) && error.contains(mend), "{lines}: {error}");
    }
    let tags: Vec<String> = (0..65).map(|n| format!("'t{n}'")).collect();
    let many = error(Some(&format!("[cache.namespaces.n]\ntags = [{}]\n", tags.join(","))), &[], &[]);
    assert!(many.contains("65 tags, and an entry carries at most 64"), "{many}");
    let fits = "[cache]\nl1_bytes = '10MB'\n[cache.namespaces.n]\nshare = '50%'\n[cache.namespaces.m]\nshare = '39%'\n";
    assert!(with(Some(fits), &[], &[]).is_ok());
    // What fits in the file need not fit what a flag says.
    assert!(error(Some(fits), &[], &[("cache.l1_bytes", "2MB")]).contains("the shares of all namespaces"));
}

#[test]
fn rules_for_tags_are_read_in_their_order_with_their_lines() {
    let file = "[[tags]]\ntable = 'enrolments'\non = ['insert', 'update']\nwhen_changed = ['status']\nraise = ['s:{a}', 'c:{b}']\n\n\
                [[tags]]\ntable = 'school.lessons'\ncascade = 'select product_id from modules where id = $1'\n\
                with = ['module_id']\nraise = ['product:{product_id}']\n";
    let tags = with(Some(file), &[], &[]).unwrap().settings.tags;
    let [enrolments, lessons] = tags.as_slice() else { panic!("{tags:?}") };
    assert_eq!((enrolments.place.as_str(), enrolments.on.len()), ("[[tags]] at walcast.toml line 2", 2));
    assert_eq!((enrolments.when_changed.as_slice(), enrolments.raise.len()), (["status".to_owned()].as_slice(), 2));
    assert_eq!((lessons.table.as_str(), lessons.with.len()), ("school.lessons", 1));
    assert!(lessons.cascade.as_ref().unwrap().contains("$1"));
    assert_eq!((lessons.place.as_str(), lessons.on.len()), ("[[tags]] at walcast.toml line 8", 3));
}

#[test]
fn a_named_file_must_be_there_and_the_usual_one_need_not() {
    let (_directory, mut inputs) = inputs();
    assert!(load(&inputs).is_ok());
    inputs.config = Some("other.toml".into());
    assert!(load(&inputs).unwrap_err().0[0].message.contains("other.toml"));
    inputs.config = None;
    inputs.env = vec![("WALCAST_CONFIG".into(), "third.toml".into())];
    assert!(load(&inputs).unwrap_err().0[0].message.contains("third.toml"));
    std::fs::write(inputs.directory.join("third.toml"), "[log]\nlevel = 'debug'").unwrap();
    assert_eq!(load(&inputs).unwrap().settings.log.level, "debug");
}

#[test]
fn the_reference_page_is_what_the_table_says() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/reference/config.md");
    let page = std::fs::read_to_string(path).unwrap_or_default();
    assert!(page == reference(), "run: walcast config --reference > docs/reference/config.md");
}
