//! Who we log in as, whom we may become, and what we may do in our own schema.

use tokio_postgres::{Client, types::Type};
use walcast_pg::{PgError, quote_ident};

use super::{Finding, server::one};
use crate::migrate;

pub(super) async fn login(client: &Client) -> Result<Vec<Finding>, PgError> {
    let sql = "select r.rolname::text, r.rolsuper, r.rolbypassrls, \
               r.rolreplication or r.rolsuper or exists (select from pg_catalog.pg_roles g \
                 where g.rolname = 'rds_replication' and pg_has_role(r.oid, g.oid, 'member')) \
               from pg_catalog.pg_roles r where r.rolname = current_user";
    let row = one(client, "reading the login role", sql).await?;
    let (name, superuser, bypass, replication): (&str, bool, bool, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
    let role = quote_ident(name);
    const OTHER: &str = "run `walcast migrate` and let `serve` log in as the role that it makes";
    let mut findings = vec![match replication {
        true => Finding::ok("replication", format!("{name} may read the WAL")),
        false => Finding::fail(
            "replication",
            format!("{name} lacks the REPLICATION attribute, without which no WAL can be read"),
            format!("alter role {role} replication;"),
        ),
    }];
    findings.push(match (superuser, bypass) {
        (true, _) => Finding::warn("login_role", format!("{name} is a superuser; `serve` needs far less"), OTHER),
        (_, true) => Finding::warn("login_role", format!("{name} bypasses row security; `serve` need not"), OTHER),
        _ => Finding::ok("login_role", format!("{name} is an ordinary role")),
    });
    Ok(findings)
}

/// A token's role must exist, be granted to us, and obey row security unless it is `service_role`.
pub(super) async fn roles(client: &Client, allowed: &[String]) -> Result<Vec<Finding>, PgError> {
    const CHECK: &str = "roles";
    // PostgreSQL 16 told apart who inherits a role from who may become it.
    let sql = "select wanted.name, r.oid is not null, coalesce(r.rolsuper, false), coalesce(r.rolbypassrls, false), \
               coalesce(pg_has_role(r.oid, case when current_setting('server_version_num')::int4 >= 160000 then 'set' else 'member' end), false), \
               current_user::text \
               from unnest($1::text[]) wanted(name) left join pg_catalog.pg_roles r on r.rolname = wanted.name";
    let rows = client.query_typed(sql, &[(&allowed, Type::TEXT_ARRAY)]).await.map_err(PgError::when("reading the roles"))?;
    let mut findings = Vec::new();
    for row in &rows {
        let (name, exists, superuser, bypass): (&str, bool, bool, bool) = (row.get(0), row.get(1), row.get(2), row.get(3));
        let (granted, login): (bool, &str) = (row.get(4), row.get(5));
        let role = quote_ident(name);
        if !exists {
            let fix = "run `walcast migrate`, or take the role out of auth.allowed_roles";
            findings.push(Finding::fail(CHECK, format!("role {name} of auth.allowed_roles does not exist"), fix));
        } else if superuser || (bypass && name != "service_role") {
            let what = if superuser { "is a superuser" } else { "bypasses row security" };
            let fix = format!("alter role {role} nosuperuser nobypassrls;\n-- or take it out of auth.allowed_roles");
            findings.push(Finding::fail(
                CHECK,
                format!("role {name} of auth.allowed_roles {what}: whoever holds its token reads everything"),
                fix,
            ));
        } else if !granted {
            let fix = format!("grant {role} to {};", quote_ident(login));
            findings.push(Finding::fail(
                CHECK,
                format!("{login} may not become {name}, so no token of that role can be served"),
                fix,
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHECK, format!("we may become {}", allowed.join(", "))));
    }
    Ok(findings)
}

pub(super) async fn migrated(client: &Client) -> Result<Vec<Finding>, PgError> {
    const CHECK: &str = "migrations";
    const DOING: &str = "reading the migrations";
    const FIX: &str = "walcast migrate --database-url <administrator's URL>";
    // Through the catalog: a name in a schema that we may not use cannot be resolved.
    let sql = "select to_regnamespace('walcast') is not null, c.oid is not null, \
               coalesce(has_table_privilege(c.oid, 'select') and has_schema_privilege(c.relnamespace, 'usage'), false), current_user::text \
               from (values (1)) one left join (select * from pg_catalog.pg_class \
                 where relname = 'migrations' and relnamespace = to_regnamespace('walcast')) c on true";
    let row = one(client, DOING, sql).await?;
    let (schema, table, readable, role): (bool, bool, bool, &str) = (row.get(0), row.get(1), row.get(2), row.get(3));
    if !table {
        let what = if schema { "table walcast.migrations" } else { "schema walcast" };
        return Ok(vec![Finding::fail(CHECK, format!("this database has not been migrated: there is no {what}"), FIX)]);
    }
    if !readable {
        let line = format!("{role} may not read schema walcast");
        let fix = format!("walcast migrate --serve-role {role} --database-url <administrator's URL>");
        return Ok(vec![Finding::fail("walcast_schema", line, fix)]);
    }
    let rows = client.query_typed("select name from walcast.migrations", &[]).await.map_err(PgError::when(DOING))?;
    let done: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    let missing: Vec<&str> = migrate::files().map(|(name, _)| name).filter(|name| !done.contains(name)).collect();
    let unknown = done.iter().filter(|name| !migrate::files().any(|(known, _)| known == **name)).count();
    Ok(vec![match (missing.is_empty(), unknown) {
        (true, 0) => Finding::ok(CHECK, format!("all {} migrations are applied", done.len())),
        (true, newer) => {
            Finding::warn(CHECK, format!("{newer} migrations come from a newer Walcast"), "run the newer Walcast everywhere")
        }
        (false, _) => Finding::fail(CHECK, format!("migrations are missing: {}", missing.join(", ")), FIX),
    }])
}

/// Only after the migrations: looks at the tables that they made.
pub(super) async fn own_schema(client: &Client) -> Result<Vec<Finding>, PgError> {
    const CHECK: &str = "walcast_schema";
    let own = migrate::own_tables();
    let sql = format!(
        "select c.relname::text, current_user::text from pg_catalog.pg_class c join pg_catalog.pg_namespace n on n.oid = c.relnamespace \
               where n.nspname = 'walcast' and c.relkind in ('r', 'p') and c.relname not in ({own}) \
               and not (has_table_privilege(c.oid, 'select') and has_table_privilege(c.oid, 'insert') \
                 and has_table_privilege(c.oid, 'update') and has_table_privilege(c.oid, 'delete')) order by 1"
    );
    let rows = client.query_typed(&sql, &[]).await.map_err(PgError::when("reading our rights in schema walcast"))?;
    let Some(first) = rows.first() else {
        return Ok(vec![Finding::ok(CHECK, "our rights in schema walcast are complete")]);
    };
    let tables: Vec<&str> = rows.iter().map(|row| row.get(0)).collect();
    let role: &str = first.get(1);
    let line = format!("{role} may not read and write walcast.{}", tables.join(", walcast."));
    Ok(vec![Finding::fail(CHECK, line, format!("walcast migrate --serve-role {role} --database-url <administrator's URL>"))])
}
