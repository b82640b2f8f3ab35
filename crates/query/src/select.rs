//! Queries and SELECTs: their CTEs, their outputs, and the context that WHERE gives.
//!
//! Part of the analyser. An output keeps its column's variable only where filtering the output is the same as
//! filtering the column: not past LIMIT, DISTINCT ON, window functions, ungrouped aggregates or set operations.

use std::{ops::ControlFlow, rc::Rc};

use sqlparser::ast::{
    Distinct, Expr, GroupByExpr, ObjectName, ObjectNamePart, Query, Select, SelectItem, SelectItemQualifiedWildcardKind, SetExpr,
    Value, Visit, Visitor, WildcardAdditionalOptions,
};

use crate::{
    analyse::{Analyser, Env, EnvId, GivenUp, Reader},
    conjunct::Place,
    from::{From, Node},
    names::{fold, reference, table_command},
    scope::{Context, Equality, Item, Scope, ScopeId, Var, widen},
};

pub(crate) struct Bound {
    body: Body,
    outputs: Vec<(String, Option<Var>)>,
    /// Not all outputs are known.
    open: bool,
    /// Only the ORDER BY, LIMIT and so on.
    tail: Option<Box<Query>>,
    place: Place,
}

enum Body {
    Select(Box<BoundSelect>),
    Nested(Box<Bound>),
    Both(Box<Bound>, Box<Bound>),
    Values(Box<SetExpr>),
}

struct BoundSelect {
    node: Node,
    filter: Option<Expr>,
    equalities: Vec<Equality>,
    /// The SELECT without FROM and WHERE.
    rest: Select,
    /// Yields no row where no combination of rows passed WHERE.
    strict: bool,
    /// GROUPING SETS and the like make nulls of grouped columns.
    nulls: bool,
}

impl Bound {
    /// None where they are not all known.
    pub fn outputs(&self) -> Option<&[(String, Option<Var>)]> {
        (!self.open).then_some(&self.outputs)
    }

    pub fn item(&self, alias: Option<String>) -> Item {
        Item { alias, schema: None, columns: self.outputs.clone(), open: self.open }
    }

    /// Nothing outside may be carried inside through the outputs.
    pub fn forget_outputs(&mut self, analyser: &mut Analyser) {
        for (_, var) in &mut self.outputs {
            let family = var.and_then(|var| analyser.families[var]);
            *var = Some(analyser.fresh(family));
        }
    }

    pub fn collected(&self, analyser: &Analyser) -> Vec<Equality> {
        match &self.body {
            Body::Select(select) if select.strict => {
                let mut all = select.equalities.clone();
                all.extend(analyser.collected(&select.node));
                all
            }
            Body::Nested(inner) => inner.collected(analyser),
            _ => Vec::new(),
        }
    }
}

impl Analyser<'_> {
    pub fn query(
        &mut self,
        query: &Query,
        parent: Option<ScopeId>,
        env: Option<EnvId>,
        context: Context,
        reader: Reader,
    ) -> Result<(), GivenUp> {
        let bound = self.bind_query(query, parent, env, reader)?;
        self.settle_query(&bound, &context)
    }

    pub fn bind_query(
        &mut self,
        query: &Query,
        parent: Option<ScopeId>,
        env: Option<EnvId>,
        reader: Reader,
    ) -> Result<Bound, GivenUp> {
        if !query.pipe_operators.is_empty() || query.for_clause.is_some() {
            return Err(GivenUp("a clause that PostgreSQL does not have".into()));
        }
        let env = self.ctes(query, env, parent);
        let mut bound = self.bind_body(&query.body, query, parent, env, reader)?;
        if query.limit_clause.is_some() || query.fetch.is_some() {
            bound.forget_outputs(self);
        }
        if query.order_by.is_some() || query.limit_clause.is_some() || query.fetch.is_some() {
            let mut tail = query.clone();
            tail.with = None;
            tail.body = Box::new(empty_values());
            bound.tail = Some(Box::new(tail));
        }
        Ok(bound)
    }

    fn ctes(&mut self, query: &Query, env: Option<EnvId>, scope: Option<ScopeId>) -> Option<EnvId> {
        let Some(with) = &query.with else { return env };
        let mut visible = env;
        // WITH RECURSIVE lets each see all of them, itself and later ones too; those yield who knows what.
        let mut veiled = env;
        if with.recursive {
            for cte in &with.cte_tables {
                let entry = Env {
                    name: fold(&cte.alias.name),
                    query: None,
                    aliases: Vec::new(),
                    inside: None,
                    recursive: true,
                    scope,
                    parent: veiled,
                };
                veiled = Some(self.env(entry));
            }
        }
        for cte in &with.cte_tables {
            let name = fold(&cte.alias.name);
            let aliases = cte.alias.columns.iter().map(|column| fold(&column.name)).collect();
            // Itself veiled, the earlier ones in sight.
            let inside = if with.recursive {
                let own = Env {
                    name: name.clone(),
                    query: None,
                    aliases: Vec::new(),
                    inside: None,
                    recursive: true,
                    scope,
                    parent: if visible == env { veiled } else { visible },
                };
                Some(self.env(own))
            } else {
                visible
            };
            let entry = Env {
                name,
                query: Some(Rc::new((*cte.query).clone())),
                aliases,
                inside,
                recursive: with.recursive,
                scope,
                parent: if with.recursive && visible == env { veiled } else { visible },
            };
            visible = Some(self.env(entry));
        }
        visible
    }

    fn env(&mut self, env: Env) -> EnvId {
        self.envs.push(env);
        self.envs.len() - 1
    }

    fn bind_body(
        &mut self,
        body: &SetExpr,
        query: &Query,
        parent: Option<ScopeId>,
        env: Option<EnvId>,
        reader: Reader,
    ) -> Result<Bound, GivenUp> {
        let outside = |this: &mut Self| Place { scope: this.scope(Scope { parent, ..Scope::default() }), env, reader };
        match body {
            SetExpr::Select(select) => self.bind_select(select, query, parent, env, reader),
            SetExpr::Query(inner) => {
                let place = outside(self);
                let inner = self.deeper(|this| this.bind_query(inner, parent, env, reader))?;
                let (outputs, open) = (inner.outputs.clone(), inner.open);
                Ok(Bound { body: Body::Nested(Box::new(inner)), outputs, open, tail: None, place })
            }
            SetExpr::SetOperation { left, right, .. } => {
                let place = outside(self);
                let bare = Query { with: None, order_by: None, limit_clause: None, fetch: None, ..query.clone() };
                let side = |this: &mut Self, body: &SetExpr| this.deeper(|this| this.bind_body(body, &bare, parent, env, reader));
                let (left, right) = (side(self, left)?, side(self, right)?);
                let (outputs, open) = (left.outputs.clone(), left.open);
                let mut bound = Bound { body: Body::Both(Box::new(left), Box::new(right)), outputs, open, tail: None, place };
                // The other side may have other types, so not even the family is known.
                bound.outputs.iter_mut().for_each(|(_, var)| *var = None);
                Ok(bound)
            }
            SetExpr::Values(values) => {
                let place = outside(self);
                let width = values.rows.first().map_or(0, |row| row.content.len());
                let outputs = (1..=width).map(|n| (format!("column{n}"), None)).collect();
                Ok(Bound { body: Body::Values(Box::new(body.clone())), outputs, open: false, tail: None, place })
            }
            SetExpr::Table(table) => {
                let (schema, name) = table_command(table).ok_or_else(|| GivenUp(format!("`{table}` is not understood")))?;
                let parts = schema.into_iter().chain([name]);
                let ident = |part| ObjectNamePart::Identifier(sqlparser::ast::Ident::with_quote('"', part));
                let name = ObjectName(parts.map(ident).collect());
                let from = From { parent, env, reader, items: Vec::new(), merged: Default::default() };
                let (node, item) = self.bind_relation(&name, &from)?;
                let place = outside(self);
                let (outputs, open) = (item.columns, item.open);
                let rest = empty_select()?;
                let select = BoundSelect { node, filter: None, equalities: Vec::new(), rest, strict: true, nulls: false };
                Ok(Bound { body: Body::Select(Box::new(select)), outputs, open, tail: None, place })
            }
            other => Err(GivenUp(format!("`{other}` is no query"))),
        }
    }

    fn bind_select(
        &mut self,
        select: &Select,
        query: &Query,
        parent: Option<ScopeId>,
        env: Option<EnvId>,
        reader: Reader,
    ) -> Result<Bound, GivenUp> {
        let foreign = select.top.is_some() || select.prewhere.is_some() || !select.connect_by.is_empty();
        if foreign || !select.lateral_views.is_empty() || select.qualify.is_some() || select.exclude.is_some() {
            return Err(GivenUp("a clause that PostgreSQL does not have".into()));
        }
        let mut from = From { parent, env, reader, items: Vec::new(), merged: Default::default() };
        let node = self.bind_from(&select.from, &mut from)?;
        let has_merged = !from.merged.is_empty();
        let scope = self.scope(Scope { parent, items: from.items, merged: from.merged });
        let place = Place { scope, env, reader };
        let equalities = select.selection.as_ref().map(|filter| self.equalities(filter, scope)).unwrap_or_default();
        let (grouped, nulls) = self.grouping(select, scope);
        let (outputs, open) = self.outputs_of(select, scope, has_merged);
        let calls = calls(select, query);
        let mut bound = Bound {
            body: Body::Select(Box::new(BoundSelect {
                node,
                filter: select.selection.clone(),
                equalities,
                rest: Select { from: Vec::new(), selection: None, ..select.clone() },
                // An aggregate without GROUP BY yields a row also of nothing.
                strict: !nulls && (grouped.is_some() || (select.having.is_none() && !calls.maybe_aggregate)),
                nulls,
            })),
            outputs,
            open,
            tail: None,
            place,
        };
        let carried = match (&grouped, &select.distinct) {
            _ if nulls || calls.window || !select.named_window.is_empty() => Some(Vec::new()),
            (_, Some(Distinct::On(_))) => Some(Vec::new()),
            (Some(by), _) => Some(by.clone()),
            (None, _) => None,
        };
        if let Some(carried) = carried {
            for (_, var) in &mut bound.outputs {
                if let Some(column) = var.filter(|var| !carried.contains(var)) {
                    *var = Some(self.fresh(self.families[column]));
                }
            }
        }
        Ok(bound)
    }

    /// The columns grouped by, if there is a GROUP BY; and whether it may make nulls of them.
    fn grouping(&self, select: &Select, scope: ScopeId) -> (Option<Vec<Var>>, bool) {
        let GroupByExpr::Expressions(by, with) = &select.group_by else { return (None, true) };
        let sets = |expr: &Expr| {
            let called = |name: &ObjectName| reference(name).is_some_and(|(_, name)| name == "rollup" || name == "cube");
            // `()` is a grouping set too.
            matches!(expr, Expr::GroupingSets(_) | Expr::Cube(_) | Expr::Rollup(_) | Expr::Tuple(_))
                || matches!(expr, Expr::Function(function) if called(&function.name))
        };
        if !with.is_empty() || by.iter().any(sets) {
            return (None, true);
        }
        if by.is_empty() {
            return (None, false);
        }
        let column = |expr: &Expr| match expr {
            Expr::Value(value) => match &value.value {
                Value::Number(position, _) => match select.projection.get(position.parse::<usize>().ok()?.checked_sub(1)?)? {
                    SelectItem::UnnamedExpr(expr) | SelectItem::ExprWithAlias { expr, .. } => self.output_var(expr, scope),
                    _ => None,
                },
                _ => None,
            },
            other => self.output_var(other, scope),
        };
        (Some(by.iter().filter_map(column).collect()), false)
    }

    fn outputs_of(&self, select: &Select, scope: ScopeId, has_merged: bool) -> (Vec<(String, Option<Var>)>, bool) {
        let (mut outputs, mut open) = (Vec::new(), false);
        for item in &select.projection {
            match item {
                SelectItem::UnnamedExpr(expr) => {
                    let name = match expr {
                        Expr::Identifier(ident) => Some(fold(ident)),
                        Expr::CompoundIdentifier(idents) => idents.last().map(fold),
                        _ => None,
                    };
                    // What PostgreSQL calls an expression is not worth knowing: nobody can narrow by it.
                    let unnamed = || format!("?column {}?", outputs.len());
                    let name = name.unwrap_or_else(unnamed);
                    open |= name.starts_with("?column");
                    outputs.push((name, self.output_var(expr, scope)));
                }
                SelectItem::ExprWithAlias { expr, alias } => outputs.push((fold(alias), self.output_var(expr, scope))),
                // USING gives `*` another order.
                SelectItem::Wildcard(options) if plain(options) && !has_merged => {
                    for item in &self.scopes[scope].items {
                        open |= item.open;
                        outputs.extend(item.columns.iter().cloned());
                    }
                }
                SelectItem::QualifiedWildcard(SelectItemQualifiedWildcardKind::ObjectName(name), options) if plain(options) => {
                    let named = reference(name).map(|(_, name)| name);
                    let items = &self.scopes[scope].items;
                    match items.iter().filter(|item| item.alias == named).collect::<Vec<_>>().as_slice() {
                        [item] => {
                            open |= item.open;
                            outputs.extend(item.columns.iter().cloned());
                        }
                        _ => open = true,
                    }
                }
                _ => open = true,
            }
        }
        (outputs, open)
    }

    pub fn settle_query(&mut self, bound: &Bound, context: &Context) -> Result<(), GivenUp> {
        let mut inside = Rc::clone(context);
        match &bound.body {
            Body::Select(select) => {
                let held = select.equalities.iter().cloned().chain(self.collected(&select.node));
                let matters = widen(context, held);
                self.settle_node(&select.node, &matters, context)?;
                if let Some(filter) = &select.filter {
                    self.filter(filter, &bound.place, &matters)?;
                }
                if !select.nulls {
                    inside = matters;
                }
                self.subqueries(&select.rest, &bound.place, &inside)?;
            }
            Body::Nested(inner) => self.settle_query(inner, context)?,
            Body::Both(left, right) => {
                self.settle_query(left, context)?;
                self.settle_query(right, context)?;
            }
            Body::Values(values) => self.subqueries(&**values, &bound.place, context)?,
        }
        match &bound.tail {
            Some(tail) => {
                // The tail is a query itself; what is inside it is what we look for.
                let parts = (tail.order_by.clone(), tail.limit_clause.clone(), tail.fetch.clone());
                self.subqueries(&parts.0, &bound.place, &inside)?;
                self.subqueries(&parts.1, &bound.place, &inside)?;
                self.subqueries(&parts.2, &bound.place, &inside)
            }
            None => Ok(()),
        }
    }
}

fn plain(options: &WildcardAdditionalOptions) -> bool {
    options.opt_ilike.is_none()
        && options.opt_exclude.is_none()
        && options.opt_except.is_none()
        && options.opt_replace.is_none()
        && options.opt_rename.is_none()
}

fn empty_values() -> SetExpr {
    SetExpr::Values(sqlparser::ast::Values { explicit_row: false, value_keyword: false, rows: Vec::new() })
}

fn empty_select() -> Result<Select, GivenUp> {
    let parsed = sqlparser::parser::Parser::parse_sql(&sqlparser::dialect::PostgreSqlDialect {}, "select 1");
    if let Ok([sqlparser::ast::Statement::Query(query)]) = parsed.as_deref()
        && let SetExpr::Select(select) = &*query.body
    {
        return Ok((**select).clone());
    }
    Err(GivenUp("TABLE is not understood".into()))
}

#[derive(Default)]
struct Calls {
    depth: usize,
    window: bool,
    maybe_aggregate: bool,
}

/// Certainly no aggregates; every other function may be one.
const SCALAR: [&str; 14] = [
    "coalesce",
    "nullif",
    "greatest",
    "least",
    "lower",
    "upper",
    "concat",
    "length",
    "round",
    "abs",
    "to_char",
    "date_trunc",
    "trim",
    "format",
];

impl Visitor for Calls {
    type Break = ();

    fn pre_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
        self.depth += 1;
        ControlFlow::Continue(())
    }

    fn post_visit_query(&mut self, _: &Query) -> ControlFlow<()> {
        self.depth -= 1;
        ControlFlow::Continue(())
    }

    fn pre_visit_expr(&mut self, expr: &Expr) -> ControlFlow<()> {
        if let Expr::Function(function) = expr {
            self.window |= function.over.is_some() && self.depth == 0;
            // An aggregate inside a sub-query may still belong to the query outside.
            let scalar =
                reference(&function.name).is_some_and(|(schema, name)| schema.is_none() && SCALAR.contains(&name.as_str()));
            self.maybe_aggregate |= !scalar;
        }
        ControlFlow::Continue(())
    }
}

fn calls(select: &Select, query: &Query) -> Calls {
    let mut calls = Calls::default();
    let _ = select.projection.visit(&mut calls);
    let _ = select.having.visit(&mut calls);
    let _ = query.order_by.visit(&mut calls);
    calls
}
