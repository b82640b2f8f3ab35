//! Tags that rules of the config raise: from columns, under conditions, and by a lookup in the database.

mod support;

use anyhow::{Context, Result, ensure};
use support::{
    DEADLINE, SERVE_ROLE, migrate,
    reads::By,
    school::{RULES, SCHEMA, School},
};
use walcast_testkit::{TestPostgres, wait};

#[tokio::test]
async fn a_rules_tag_falls_by_the_new_and_the_old_value_and_only_by_those() -> Result<()> {
    let house = School::open().await?;
    let tags = ["student:1", "student:2", "student:3", "course:a%2Eb", "course:c"];
    let insert = "insert into enrolments values (1, 1, 'a.b', 'open', 'x')";
    ensure!(house.fallen(&tags, insert).await? == ["student:1", "course:a%2Eb"]);
    // Neither of the columns that count, and the other rule is not for updates.
    let note = "update enrolments set note = 'y', course_id = 'c' where id = 1";
    ensure!(house.fallen(&tags, note).await?.is_empty());
    let status = "update enrolments set status = 'closed' where id = 1";
    ensure!(house.fallen(&tags, status).await? == ["student:1"]);
    let moved = "update enrolments set student_id = 2 where id = 1";
    ensure!(house.fallen(&tags, moved).await? == ["student:1", "student:2"]);
    let nobody = "update enrolments set student_id = null where id = 1";
    ensure!(house.fallen(&tags, nobody).await? == ["student:2"]);
    ensure!(house.fallen(&tags, "delete from enrolments where id = 1").await? == ["course:c"]);
    ensure!(house.fallen(&tags, "begin; insert into enrolments values (2, 3, 'c'); rollback").await?.is_empty());
    ensure!(house.fallen(&tags, "truncate enrolments").await? == tags);
    // A rule that has to widen widens its own word only.
    let tags = ["ward:1", "ward:2", "student:1"];
    ensure!(house.fallen(&tags, "insert into visits values (1, 1)").await? == ["ward:1"]);
    ensure!(house.fallen(&tags, "update visits set ward = 3 where id = 1").await? == ["ward:1", "ward:2"], "no old value");
    // Redefined: nobody knows what its rows were.
    let redefined = "alter table visits add column note text; insert into visits values (2, 9)";
    ensure!(house.fallen(&tags, redefined).await? == ["ward:1", "ward:2"]);
    house.server.stop().await
}

#[tokio::test]
async fn an_application_can_carry_only_what_a_rule_raises() -> Result<()> {
    let house = School::open().await?;
    let put = async |tag: &str| {
        house.reads.delete("/cache/v1/school/x").await?;
        house.reads.fill("/cache/v1/school/x", tag, async || Ok("value".into())).await
    };
    ensure!(put("student:7").await? == "stored");
    ensure!(put("homework:7:b").await? == "stored", "a tag of its own");
    for (tag, why) in [
        ("student:*", "would fall with no student"),
        ("enrolments:id=*", "would fall with no row"),
        ("student:7:a", "no rule raises it"),
        ("student:a.b", "spelled otherwise"),
    ] {
        ensure!(put(tag).await? == "untracked_tag", "{tag}: {why}");
    }
    // By hand, the coarse form lets all of them fall.
    house.fill("student:7").await?;
    house.fill("course:7").await?;
    house.reads.invalidate(serde_json::json!({ "tags": ["student:*"] })).await?;
    ensure!(!house.fresh("student:7").await? && house.fresh("course:7").await?);
    // Who wrote one enrolment cannot vouch for all of a student's.
    let client = house.postgres.connect().await?;
    let sql = "with done as (insert into enrolments values (5, 5, 'c') returning 1) select pg_current_xact_id()::text from done";
    let xid = client.query_one(sql, &[]).await?.get::<_, String>(0).parse()?;
    let answer = house.reads.put("/cache/v1/school/y", By::Written(xid), "enrolments:id=5, student:5", "value").await?;
    ensure!(answer == "ticket_required", "{answer}");
    house.server.stop().await
}

#[tokio::test]
async fn a_cascade_lets_fall_what_its_lookup_leads_to_and_nothing_else() -> Result<()> {
    let house = School::open().await?;
    let tags = ["product:1", "product:2", "product:3"];
    let lesson = "update module_lessons set title = 'new' where id = 15";
    ensure!(house.fallen(&tags, lesson).await? == ["product:1"]);
    // Moved from one module to another: both modules' products.
    let moved = "update module_lessons set module_id = 25 where id = 15";
    ensure!(house.fallen(&tags, moved).await? == ["product:1", "product:2"]);
    ensure!(house.fallen(&tags, "delete from module_lessons where id = 35").await? == ["product:3"]);
    // The lookup finds the commit's own rows, and nothing for a module that is nowhere.
    let together = "begin; insert into modules values (500, 2, 'm'); insert into module_lessons values (500, 500, 'l'); commit";
    ensure!(house.fallen(&tags, together).await? == ["product:2"]);
    ensure!(house.fallen(&tags, "insert into module_lessons values (900, 900, 'l')").await?.is_empty());
    // A module that moves takes its lessons along: the product that has them no longer falls too, though a lookup would
    // not lead there any more.
    let both =
        "begin; update module_lessons set title = 'newer' where id = 15; update modules set product_id = 3 where id = 25; commit";
    ensure!(house.fallen(&tags, both).await? == ["product:2", "product:3"]);
    ensure!(house.metric("walcast_cascades_failed_total").await? == 0);
    ensure!(house.metric("walcast_cascades_total").await? >= 5);
    house.server.stop().await
}

#[tokio::test]
async fn a_lookup_that_fails_or_takes_too_long_lets_all_of_its_word_fall() -> Result<()> {
    let house = School::open().await?;
    let tags = ["product:1", "product:2", "student:1"];
    house.postgres.execute("revoke select on modules from walcast").await?;
    // The catalog moved: everything of rules falls once, and may be filled anew.
    wait::until(DEADLINE, "the missing right is noticed", async || {
        let Ok(answer) = reqwest::get(format!("{}/readyz", house.server.url)).await else { return false };
        answer.text().await.is_ok_and(|text| text.contains("tag_rules"))
    })
    .await?;
    let lesson = "update module_lessons set title = 'new' where id = 15";
    ensure!(house.fallen(&tags, lesson).await? == ["product:1", "product:2"], "no right");
    let failed = house.metric("walcast_cascades_failed_total").await?;
    ensure!(failed >= 1);
    house.postgres.execute("grant select on modules to walcast").await?;
    wait::until(DEADLINE, "lookups work again", async || {
        house.fallen(&tags, lesson).await.is_ok_and(|fallen| fallen == ["product:1"])
    })
    .await?;
    // Nobody answers while the table is locked.
    house.reads.settled().await?;
    for tag in tags {
        house.fill(tag).await?;
    }
    let locker = house.postgres.connect().await?;
    locker.batch_execute("begin; lock table modules in access exclusive mode").await?;
    house.postgres.execute(lesson).await?;
    house.reads.settled().await?;
    ensure!(!house.fresh("product:1").await? && !house.fresh("product:2").await? && house.fresh("student:1").await?);
    locker.batch_execute("rollback").await?;
    ensure!(house.fallen(&tags, lesson).await? == ["product:1"], "and afterwards it is precise again");
    house.server.stop().await
}

#[tokio::test]
async fn p7_an_update_of_200_000_rows_raises_a_few_tags() -> Result<()> {
    // Enough memory to look at each row: a larger transaction touches whole tables before any rule is asked.
    // And time to read it in without a heartbeat between.
    let room = [
        ("WALCAST_STREAM__TRANSACTION_BYTES", "1GiB"),
        ("WALCAST_STREAM__SETTLE_BYTES", "1GiB"),
        ("WALCAST_CACHE__MAX_STALENESS", "60s"),
    ];
    let house = School::with(SCHEMA, RULES, &room).await?;
    let fill = "insert into enrolments select i, i, i::text, 'open' from generate_series(1, 200000) i;
                insert into module_lessons select i, i, 'l' from generate_series(1000, 21000) i";
    house.postgres.execute(fill).await?;
    wait::until(DEADLINE, "all of it is read", async || house.reads.settled().await.is_ok()).await?;
    let before = (house.metric("walcast_rule_tags_raised_total").await?, house.metric("walcast_cascades_total").await?);
    let tags = ["student:7", "product:7", "ward:7"];
    let sql = "begin; update enrolments set status = 'closed'; update module_lessons set title = 'x'; commit";
    for tag in tags {
        house.fill(tag).await?;
    }
    house.postgres.execute(sql).await?;
    wait::until(DEADLINE, "all of it is read", async || house.reads.settled().await.is_ok()).await?;
    ensure!(!house.fresh("student:7").await? && !house.fresh("product:7").await? && house.fresh("ward:7").await?);
    let raised = house.metric("walcast_rule_tags_raised_total").await? - before.0;
    ensure!(raised <= 10, "{raised} tags for one update");
    ensure!(house.metric("walcast_cascades_total").await? == before.1, "nothing of it was looked up");
    house.server.stop().await
}

#[tokio::test]
async fn a_rule_that_does_not_fit_the_database_is_named_with_its_line_and_what_mends_it() -> Result<()> {
    let postgres = TestPostgres::start().await?;
    migrate(&postgres, SCHEMA, &[]).await?;
    postgres
        .execute(
            "create unlogged table heard_by_nobody (id bigint primary key);
             revoke select on modules from walcast;
             grant select on enrolments, visits, heard_by_nobody to walcast;
             alter table visits enable row level security;
             create function moody(bigint) returns bigint language sql volatile as 'select $1';",
        )
        .await?;
    let cascade = |sql: &str| {
        let (table, with) = ("module_lessons", "module_id");
        format!("table = \"{table}\"\ncascade = \"{sql}\"\nwith = [\"{with}\"]\nraise = [\"product:{{product_id}}\"]\n")
    };
    let plain = |table: &str, raise: &str| format!("table = \"{table}\"\nraise = [\"{raise}\"]\n");
    for (rule, what, mend) in [
        (plain("enrolment", "s:{student_id}"), "there is no table public.enrolment", "schema.table"),
        (plain("heard_by_nobody", "s:{id}"), "is not in publication walcast", "add table only \"public\".\"heard_by_nobody\""),
        (plain("enrolments", "s:{student}"), "has no column `student`", "student_id"),
        (cascade("select product_id from module where id = $1"), "relation \"module\" does not exist", ""),
        (
            cascade("select product_id from modules where id = $1"),
            "permission denied for table modules",
            "grant select on modules to \"walcast\";",
        ),
        (cascade("select id from enrolments where id = $1"), "has no column `product_id`", "its lookup gives id"),
        (cascade("select ward as product_id from visits where id = $1"), "row-level security", "SECURITY DEFINER"),
        (cascade("delete from enrolments where id = $1 returning id as product_id"), "", "SELECT"),
        (cascade("select moody(id) as product_id from enrolments where id = $1"), "moody", ""),
        (cascade("select id as product_id from heard_by_nobody where id = $1"), "not heard", "heard_by_nobody"),
        (cascade("select id as product_id from enrolments where id = $1 and id = $2"), "2 parameters", "module_id"),
    ] {
        let files = tempfile::tempdir()?;
        let config = files.path().join("walcast.toml");
        std::fs::write(&config, format!("# a comment\n[[tags]]\n{rule}"))?;
        for command in ["check", "serve"] {
            let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_walcast"))
                .arg(command)
                .env("WALCAST_CONFIG", &config)
                .env("WALCAST_DATABASE_URL", postgres.url_as(SERVE_ROLE, "postgres"))
                .env("WALCAST_LISTEN", "127.0.0.1:0")
                .env("WALCAST_JWT_SECRET", support::SECRET)
                .kill_on_drop(true)
                .output();
            let output = tokio::time::timeout(DEADLINE, output).await.with_context(|| format!("{command} runs on: {rule}"))??;
            let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
            ensure!(output.status.code() == Some(1), "{command} {rule}: {text}");
            ensure!(text.contains("line 3") && text.contains(what) && text.contains(mend), "{command} {rule}: {text}");
        }
    }
    Ok(())
}

#[tokio::test]
async fn check_says_what_would_make_a_rule_precise() -> Result<()> {
    let house = School::open().await?;
    let rules = "[[tags]]\ntable = \"visits\"\nraise = [\"ward:{ward}\"]\n
        [[tags]]\ntable = \"module_lessons\"\ncascade = \"select product_id from modules where id = $1\"
        with = [\"module_id\"]\nraise = [\"product:{product_id}\"]\n";
    let files = tempfile::tempdir()?;
    let config = files.path().join("walcast.toml");
    std::fs::write(&config, rules)?;
    let output = tokio::process::Command::new(env!("CARGO_BIN_EXE_walcast"))
        .arg("check")
        .env("WALCAST_CONFIG", &config)
        .env("WALCAST_DATABASE_URL", house.postgres.url_as(SERVE_ROLE, "postgres"))
        .env("WALCAST_JWT_SECRET", support::SECRET)
        .output()
        .await?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for part in [
        "do not say what ward was",
        "alter table \"public\".\"visits\" replica identity full;",
        "its lookup reads public.modules",
    ] {
        ensure!(text.contains(part), "{part}: {text}");
    }
    house.server.stop().await
}

#[tokio::test]
async fn without_a_rule_for_the_looked_up_table_its_changes_let_all_of_the_word_fall() -> Result<()> {
    let rules =
        RULES.replace("table = \"modules\"\nraise = [\"product:{product_id}\"]", "table = \"visits\"\nraise = [\"bed:{id}\"]");
    ensure!(rules != RULES);
    let house = School::with(SCHEMA, &rules, &[]).await?;
    let tags = ["product:1", "product:2", "student:1"];
    ensure!(house.fallen(&tags, "update modules set product_id = 3 where id = 15").await? == ["product:1", "product:2"]);
    house.server.stop().await
}
