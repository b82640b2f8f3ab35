-- Tables whose row security is hard to follow from the outside. Every identity may know `marks`.
create table public.marks (n bigint primary key);
grant select on public.marks to anon, authenticated, service_role;

create table public.plain_owner (id bigint primary key, owner uuid, body text, amount numeric);
create policy own on public.plain_owner for select to authenticated using (owner = auth.uid());

-- Who is in which team, and what a team has. The policy asks a table that has a policy itself.
create table public.members (id bigint primary key, team int, who uuid);
create policy own on public.members for select to authenticated using (who = auth.uid());
create table public.team_notes (id bigint primary key, team int, body text);
create policy team on public.team_notes for select to authenticated
    using (team in (select m.team from public.members m where m.who = auth.uid()));

-- Two ways in, and one way out that wins over both.
create table public.either (id bigint primary key, owner uuid, shared boolean, hidden boolean, body text);
create policy own on public.either for select to authenticated using (owner = auth.uid());
create policy shared on public.either for select to anon, authenticated using (shared);
create policy not_hidden on public.either as restrictive for select to public using (not hidden);
grant select on public.either to anon;

create table public.by_claim (id bigint primary key, tenant int, grade text, body text);
create policy tenant on public.by_claim for select to authenticated
    using (tenant = (auth.jwt() ->> 'tenant')::int and grade = any (array(select jsonb_array_elements_text(auth.jwt() -> 'app' -> 'grades'))));

-- The table behind the function is closed to everybody.
create schema hidden;
create table hidden.staff (who uuid, team int);
create function public.is_staff(team int) returns boolean language sql stable security definer set search_path = '' as
    $$ select exists (select from hidden.staff s where s.team = is_staff.team and s.who = auth.uid()) $$;
create table public.by_function (id bigint primary key, team int, body text);
create policy staff on public.by_function for select to authenticated using (public.is_staff(team));

-- The policy reads a column that nobody may select.
create table public.few_columns (id bigint primary key, body text, secret text, holder uuid);
create policy own on public.few_columns for select to authenticated using (holder = auth.uid());
revoke all on public.few_columns from public, anon, authenticated;
grant select (id, body) on public.few_columns to authenticated;

create table public.parts (id bigint, region text, owner uuid, body text, primary key (id, region)) partition by list (region);
create table public.parts_a partition of public.parts for values in ('a');
create table public.parts_b (gone int, body text, owner uuid, region text not null, id bigint not null, also_gone text);
alter table public.parts_b drop column gone, drop column also_gone;
alter table public.parts attach partition public.parts_b for values in ('b');
alter table public.parts_a replica identity full;
alter table public.parts_b replica identity full;
create policy own on public.parts for select to authenticated using (owner = auth.uid());

create table public.locked (id bigint primary key, body text);

create table public.altered (a int, id bigint primary key, b text, owner uuid, c int);
alter table public.altered drop column a;
alter table public.altered drop column b;
alter table public.altered add column "late" text default 'late';
create policy own on public.altered for select to authenticated using (owner = auth.uid());

create table public."Odd Näme" ("ID" bigint primary key, "select" uuid, "Quo""ted, (col)" text, "ünï côde" text);
create policy "an ""odd"" policy" on public."Odd Näme" for select to authenticated
    using ("select" = auth.uid() and "Quo""ted, (col)" <> 'closed');

create table public.lists (id bigint primary key, readers text[], meta jsonb, words text[]);
create policy readers on public.lists for select to authenticated
    using (auth.uid()::text = any (readers) or meta -> 'readers' ? (auth.uid())::text);

-- Without the full old row a DELETE cannot be judged.
create table public.keyed (id bigint primary key, owner uuid, body text, long text);
alter table public.keyed alter column long set storage external;
create policy own on public.keyed for select to authenticated using (owner = auth.uid());

-- PostgreSQL itself refuses to read this one: its policy asks for itself.
create table public.recursive (id bigint primary key, owner uuid);
create policy round on public.recursive for select to authenticated
    using (owner = auth.uid() or exists (select from public.recursive r where r.owner = auth.uid()));

-- The same thought by way of a function, which works.
create table public.own_kind (id bigint primary key, owner uuid, kind int);
create function public.has_kind(wanted int) returns boolean language sql stable security definer set search_path = '' as
    $$ select exists (select from public.own_kind o where o.kind = wanted and o.owner = auth.uid()) $$;
create policy kind on public.own_kind for select to authenticated using (owner = auth.uid() or public.has_kind(kind));

-- No row security at all.
create table public.open (id bigint primary key, body text);

do $$
declare
    name text;
begin
    foreach name in array array['plain_owner', 'members', 'team_notes', 'either', 'by_claim', 'by_function', 'few_columns', 'parts',
                                'locked', 'altered', 'Odd Näme', 'lists', 'keyed', 'recursive', 'own_kind', 'open'] loop
        if name <> 'open' then
            execute format('alter table public.%I enable row level security', name);
        end if;
        if name <> 'few_columns' then
            execute format('grant select on public.%I to authenticated', name);
        end if;
        execute format('grant select on public.%I to service_role', name);
        if name not in ('keyed', 'parts') then
            execute format('alter table public.%I replica identity full', name);
        end if;
    end loop;
end
$$;
alter table public.parts replica identity full;
alter publication supabase_realtime set (publish_via_partition_root = true);
