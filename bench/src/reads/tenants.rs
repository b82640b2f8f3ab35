//! A write of one tenant among 1,000: how many other tenants' cached answers it costs. Under row security, by claim.

use anyhow::ensure;
use serde_json::json;

use crate::{
    Size,
    figures::table,
    stage::{DEADLINE, Server, Stage},
    wire::{Wire, http_request},
};

const TENANTS: i64 = 1_000;
const WRITES: i64 = 50;

const SCHEMA: &str = "
create table invoices (id bigint generated always as identity primary key, tenant_id bigint not null, amount numeric not null);
create index on invoices (tenant_id);
alter table invoices replica identity full;
insert into invoices (tenant_id, amount) select 1 + n % 1000, n from generate_series(1, 20000) n;
alter table invoices enable row level security;
create policy own on invoices for select to authenticated
  using (tenant_id = ((select auth.jwt()) ->> 'tenant_id')::bigint);
grant select on invoices to authenticated, service_role;";

const BY_PARAMETER: &str = "-- name: invoices_of\n-- param: tenant_id bigint\n-- ttl: 1h\nselect id, amount from invoices where tenant_id = $1 order by id\n";
const BY_CLAIM: &str = "-- name: my_invoices\n-- ttl: 1h\n-- max_rows: 1000\nselect id, amount from invoices order by id\n";

#[derive(Clone, Copy)]
enum By {
    Parameter,
    Claim,
}

pub async fn run(_size: &Size) -> anyhow::Result<()> {
    let stage = Stage::set_sql(SCHEMA).await?;
    let queries = tempfile::tempdir()?;
    std::fs::write(queries.path().join("invoices_of.sql"), BY_PARAMETER)?;
    std::fs::write(queries.path().join("my_invoices.sql"), BY_CLAIM)?;
    let dir = queries.path().to_string_lossy().into_owned();
    let mut server = stage.serve(&[("WALCAST_QUERIES__DIR", &dir), ("WALCAST_DATABASE__STATEMENT_TIMEOUT", "30s")])?;
    server.ready().await?;
    let client = stage.postgres.connect().await?;
    let mut rows = Vec::new();
    for by in [By::Parameter, By::Claim] {
        let requests: Vec<Vec<u8>> = (1..=TENANTS).map(|tenant| request(&server, by, tenant)).collect();
        let mut wire = Wire::connect(server.address()).await?;
        let until = tokio::time::Instant::now() + DEADLINE;
        while misses(&mut wire, &requests).await? > 0 {
            ensure!(tokio::time::Instant::now() < until, "some answers are never kept");
        }
        let (mut own, mut needless) = (0, 0);
        for n in 1..=WRITES {
            let tenant = 1 + (n * 37) % TENANTS;
            client
                .execute(
                    "update invoices set amount = amount + 1 where id = (select min(id) from invoices where tenant_id = $1)",
                    &[&tenant],
                )
                .await?;
            let place = (tenant - 1) as usize;
            let until = tokio::time::Instant::now() + DEADLINE;
            while wire.http(&requests[place]).await?.is_fresh_hit() {
                ensure!(tokio::time::Instant::now() < until, "the written tenant's answer stays");
            }
            own += 1;
            needless += misses(&mut wire, &requests).await? as i64;
            // What was missed just now is asked again until it is kept, and so is the tenant's own.
            while misses(&mut wire, &requests).await? > 0 {}
        }
        let name = match by {
            By::Parameter => "by parameter, service_role",
            By::Claim => "by claim, under row security",
        };
        rows.push(vec![name.to_owned(), own.to_string(), needless.to_string(), format!("{:.3}", needless as f64 / own as f64)]);
    }
    server.stop().await?;
    let title = format!("tenants: {TENANTS} tenants' answers cached, {WRITES} writes to one tenant each");
    table(&title, &["", "rightly dropped", "needlessly dropped", "needless per write"], &rows);
    Ok(())
}

fn request(server: &Server, by: By, tenant: i64) -> Vec<u8> {
    match by {
        By::Parameter => http_request(
            "GET",
            &format!("/query/v1/invoices_of?tenant_id={tenant}"),
            &server.token("service_role", None),
            "",
            b"",
        ),
        By::Claim => {
            let token = server.token_with("authenticated", json!({ "tenant_id": tenant.to_string() }));
            http_request("GET", "/query/v1/my_invoices", &token, "", b"")
        }
    }
}

/// How many of the answers are not hits.
async fn misses(wire: &mut Wire, requests: &[Vec<u8>]) -> anyhow::Result<usize> {
    let mut misses = 0;
    for request in requests {
        let answer = wire.http(request).await?;
        ensure!(answer.status == 200, "{}", answer.head);
        misses += usize::from(!answer.is_fresh_hit());
    }
    Ok(misses)
}
