//! What SQL must know of the cache's settings: limits, namespaces, and who may use which. Written from the config at each
//! `migrate`, so that the database says what the config says; only rows for namespace `*` are the administrator's own.

use std::{collections::BTreeSet, fmt::Write, time::Duration};

use walcast_cache::{SQL_FACE, SQL_SETTINGS};
use walcast_pg::quote_literal;

use crate::{
    config::{CacheSettings, NamespaceSettings},
    namespaces::{Grant, Right},
};

/// The part of the cache's settings that SQL obeys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CacheRights {
    pub max_staleness: Duration,
    pub max_value_bytes: usize,
    pub default_ttl: Duration,
    pub strict: bool,
    pub namespaces: Vec<NamespaceRights>,
}

#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct NamespaceRights {
    pub name: String,
    pub ttl: Option<Duration>,
    /// Carried by every entry.
    pub tags: Vec<String>,
    /// Its values do not come from this database.
    pub external: bool,
    /// Each security context has its own entry under a key.
    pub per_context: bool,
    /// Beside `service_role`. SQL knows roles only: what the config grants to claims is not among them.
    pub grants: Vec<RoleGrant>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RoleGrant {
    pub role: String,
    pub read: bool,
    pub write: bool,
    pub invalidate: bool,
}

impl Default for CacheRights {
    fn default() -> CacheRights {
        CacheRights {
            max_staleness: Duration::from_secs(5),
            max_value_bytes: 1 << 20,
            default_ttl: Duration::from_secs(300),
            strict: false,
            namespaces: Vec::new(),
        }
    }
}

impl From<&CacheSettings> for CacheRights {
    fn from(cache: &CacheSettings) -> CacheRights {
        let namespace = |(name, settings): (&String, &NamespaceSettings)| NamespaceRights {
            name: name.clone(),
            ttl: settings.entries.ttl,
            tags: settings.entries.tags.iter().map(|tag| tag.as_str().to_owned()).collect(),
            external: settings.entries.external,
            per_context: settings.context.is_some(),
            grants: role_grants(settings),
        };
        CacheRights {
            max_staleness: cache.max_staleness,
            max_value_bytes: cache.max_value_bytes,
            default_ttl: cache.default_ttl,
            strict: cache.strict,
            namespaces: cache.namespaces.iter().map(namespace).collect(),
        }
    }
}

fn role_grants(settings: &NamespaceSettings) -> Vec<RoleGrant> {
    let holds = |right: Right, name: &str| settings.grants(right).contains(&Grant::Role(name.to_owned()));
    let roles = Right::ALL.iter().flat_map(|right| settings.grants(*right)).filter_map(|grant| match grant {
        Grant::Role(role) => Some(role),
        Grant::Claim { .. } => None,
    });
    let roles: BTreeSet<&String> = roles.collect();
    let grant = |role: &String| RoleGrant {
        role: role.clone(),
        read: holds(Right::Read, role),
        write: holds(Right::Write, role),
        invalidate: holds(Right::Invalidate, role),
    };
    roles.into_iter().map(grant).collect()
}

/// One block; running it again changes nothing.
pub(super) fn sql(rights: &CacheRights, publication: &str) -> String {
    let mut namespaces: Vec<&NamespaceRights> = rights.namespaces.iter().collect();
    namespaces.sort_by(|a, b| a.name.cmp(&b.name));
    let named = namespaces.iter().map(|namespace| {
        let ttl = namespace.ttl.map_or("null".into(), interval);
        let tags: Vec<String> = namespace.tags.iter().map(|tag| literal(tag)).collect();
        let (name, external, per_context) = (literal(&namespace.name), namespace.external, namespace.per_context);
        format!("({name}, {ttl}, array[{}]::text[], {external}, {per_context})", tags.join(", "))
    });
    let named = values(named, "(null::text, null::interval, null::text[], null::boolean, null::boolean)");
    let granted = namespaces.iter().flat_map(|namespace| {
        let mut grants = namespace.grants.clone();
        grants.sort_by(|a, b| a.role.cmp(&b.role));
        grants.into_iter().map(|grant| {
            let RoleGrant { role, read, write, invalidate } = grant;
            format!("({}, {}, {read}, {write}, {invalidate})", literal(&namespace.name), literal(&role))
        })
    });
    let granted = values(granted, "(null::text, null::text, null::boolean, null::boolean, null::boolean)");
    format!(
        r#"delete from walcast.cache_namespaces;
insert into walcast.cache_namespaces (namespace, ttl, tags, external, per_context)
select * from (values
{named}
) config(namespace, ttl, tags, external, per_context) where namespace is not null;
delete from walcast.namespace_grants where namespace <> '*';
insert into walcast.namespace_grants (namespace, role, can_read, can_write, can_invalidate)
select * from (values
{granted}
) config(namespace, role, can_read, can_write, can_invalidate) where namespace is not null;
insert into walcast.cache_settings (publication, max_staleness, max_value_bytes, default_ttl, strict)
values ({publication}, {max_staleness}, {max_value_bytes}, {default_ttl}, {strict})
on conflict ("only") do update set publication = excluded.publication, max_staleness = excluded.max_staleness,
  max_value_bytes = excluded.max_value_bytes, default_ttl = excluded.default_ttl, strict = excluded.strict;
-- Who is granted anything may call, and is asked for his grants at each call.
do $walcast$
declare
  caller text;
  face text;
begin
  for caller in
    select r.rolname from pg_catalog.pg_roles r
    where r.rolname in ('anon', 'authenticated', 'service_role') or r.rolname in (select g.role from walcast.namespace_grants g)
    order by 1
  loop
    if not has_schema_privilege(caller, 'walcast', 'usage') then
      execute format('grant usage on schema walcast to %I', caller);
    end if;
    foreach face in array array[
      {face}
    ] loop
      if not has_function_privilege(caller, 'walcast.' || face, 'execute') then
        execute format('grant execute on function walcast.%s to %I', face, caller);
      end if;
    end loop;
  end loop;
end
$walcast$;
"#,
        publication = literal(publication),
        max_staleness = interval(rights.max_staleness),
        max_value_bytes = rights.max_value_bytes,
        default_ttl = interval(rights.default_ttl),
        strict = rights.strict,
        face = SQL_FACE.iter().map(|face| literal(face)).collect::<Vec<_>>().join(",\n      "),
    )
}

/// The tables of our schema that the serve role has no business in, as a list for `not in`.
pub(crate) fn own_tables() -> String {
    let names = ["migrations"].iter().chain(SQL_SETTINGS);
    names.map(|name| literal(name)).collect::<Vec<_>>().join(", ")
}

/// One row a line; `none` gives an empty list its types.
fn values(rows: impl Iterator<Item = String>, none: &str) -> String {
    let mut text = format!("  {none}");
    for row in rows {
        let _ = write!(text, ",\n  {row}");
    }
    text
}

fn interval(time: Duration) -> String {
    format!("interval '{} milliseconds'", time.as_millis())
}

fn literal(text: &str) -> String {
    quote_literal(text).trim_start().to_owned()
}
