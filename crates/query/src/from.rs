//! FROM lists: gives every occurrence of a relation its columns, and joins their conditions.
//!
//! Part of the analyser. Binding comes first (which names are there, which equalities hold), settling second (each
//! occurrence in its final context).

use std::{collections::HashMap, rc::Rc};

use sqlparser::ast::{Expr, JoinConstraint, JoinOperator, ObjectName, TableAlias, TableFactor, TableWithJoins};

use crate::{
    analyse::{Analyser, EnvId, GivenUp, Occurrence, Reader},
    conjunct::Place,
    known::Nature,
    names::{fold, reference},
    scope::{Context, Equality, Item, Scope, ScopeId, Var, resolve, widen},
    select::Bound,
};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum JoinKind {
    Inner,
    Left,
    Right,
    Full,
}

pub(crate) enum Node {
    Nothing,
    Table(Occurrence),
    Derived(Box<Bound>),
    /// A function in FROM: only its arguments may hold sub-queries.
    Loose(Box<TableFactor>, Place),
    Join(Box<Join>),
}

pub(crate) struct Join {
    kind: JoinKind,
    left: Node,
    right: Node,
    on: Vec<Equality>,
    condition: Option<Expr>,
    place: Place,
}

/// What a FROM list is bound in.
pub(crate) struct From {
    pub parent: Option<ScopeId>,
    pub env: Option<EnvId>,
    pub reader: Reader,
    pub items: Vec<Item>,
    pub merged: HashMap<String, Option<Var>>,
}

impl Analyser<'_> {
    pub fn bind_from(&mut self, tables: &[TableWithJoins], from: &mut From) -> Result<Node, GivenUp> {
        let mut root = Node::Nothing;
        for table in tables {
            let (node, merged) = self.bind_joins(table, from)?;
            merge(&mut from.merged, merged);
            root = match root {
                Node::Nothing => node,
                left => {
                    let place = self.place(from, Scope::default());
                    join(JoinKind::Inner, left, node, Vec::new(), None, place)
                }
            };
        }
        Ok(root)
    }

    fn place(&mut self, from: &From, scope: Scope) -> Place {
        Place { scope: self.scope(scope), env: from.env, reader: from.reader }
    }

    fn bind_joins(&mut self, table: &TableWithJoins, from: &mut From) -> Result<(Node, HashMap<String, Option<Var>>), GivenUp> {
        let start = from.items.len();
        let mut merged = HashMap::new();
        let mut left = self.bind_factor(&table.relation, from, &mut merged)?;
        for step in &table.joins {
            let middle = from.items.len();
            let (kind, constraint) = join_kind(&step.join_operator)?;
            let mut right_merged = HashMap::new();
            let right = self.bind_factor(&step.relation, from, &mut right_merged)?;
            let side =
                |items: &[Item], merged: &HashMap<_, _>| Scope { parent: None, items: items.to_vec(), merged: merged.clone() };
            let left_scope = self.scope(side(&from.items[start..middle], &merged));
            let right_scope = self.scope(side(&from.items[middle..], &right_merged));
            merge(&mut merged, right_merged);
            // ON sees the two sides and the queries around, but not its neighbours in FROM.
            let around = Scope { parent: from.parent, items: from.items[start..].to_vec(), merged: merged.clone() };
            let place = self.place(from, around);
            let (mut on, mut condition) = (Vec::new(), None);
            match constraint {
                JoinConstraint::On(expr) => {
                    on = self.equalities(expr, place.scope);
                    condition = Some(expr.clone());
                }
                JoinConstraint::Using(columns) => {
                    for column in columns {
                        let name = using_column(column)?;
                        let pair =
                            [left_scope, right_scope].map(|scope| resolve(&self.scopes, scope, std::slice::from_ref(&name)));
                        if let [Some(a), Some(b)] = pair {
                            on.push(Equality::Columns(a, b));
                        }
                        let shown = match kind {
                            JoinKind::Inner | JoinKind::Left => pair[0],
                            JoinKind::Right => pair[1],
                            JoinKind::Full => None,
                        };
                        merged.insert(name, shown);
                    }
                }
                JoinConstraint::Natural => {
                    let names = |scope: ScopeId| {
                        let scope = &self.scopes[scope];
                        let open = scope.items.iter().any(|item| item.open);
                        (!open).then(|| {
                            scope.items.iter().flat_map(|item| &item.columns).map(|(n, _)| n.clone()).collect::<Vec<_>>()
                        })
                    };
                    let (Some(a), Some(b)) = (names(left_scope), names(right_scope)) else {
                        return Err(GivenUp("NATURAL JOIN with something whose columns are not known".into()));
                    };
                    merged.extend(a.into_iter().filter(|name| b.contains(name)).map(|name| (name, None)));
                }
                JoinConstraint::None => {}
            }
            left = join(kind, left, right, on, condition, place);
        }
        Ok((left, merged))
    }

    fn bind_factor(
        &mut self,
        factor: &TableFactor,
        from: &mut From,
        merged: &mut HashMap<String, Option<Var>>,
    ) -> Result<Node, GivenUp> {
        match factor {
            TableFactor::Table { name, alias, args: None, version: None, sample: None, json_path: None, partitions, .. }
                if partitions.is_empty() =>
            {
                let (node, mut item) = self.bind_relation(name, from)?;
                rename(&mut item, alias.as_ref())?;
                from.items.push(item);
                Ok(node)
            }
            TableFactor::Derived { lateral, subquery, alias, sample: None } => {
                let parent = if *lateral { self.siblings(from) } else { from.parent };
                let bound = self.deeper(|this| this.bind_query(subquery, parent, from.env, from.reader))?;
                let mut item = bound.item(None);
                rename(&mut item, alias.as_ref())?;
                from.items.push(item);
                Ok(Node::Derived(Box::new(bound)))
            }
            TableFactor::NestedJoin { table_with_joins, alias: None } => {
                let (node, inner) = self.bind_joins(table_with_joins, from)?;
                merge(merged, inner);
                Ok(node)
            }
            TableFactor::Table { name, alias, args: Some(_), sample: None, .. } | TableFactor::Function { name, alias, .. } => {
                Ok(self.bind_function(factor, Some(name), alias.as_ref(), from))
            }
            TableFactor::UNNEST { alias, .. } | TableFactor::TableFunction { alias, .. } => {
                Ok(self.bind_function(factor, None, alias.as_ref(), from))
            }
            other => Err(GivenUp(format!("`{other}` in FROM is not understood"))),
        }
    }

    fn siblings(&mut self, from: &From) -> Option<ScopeId> {
        Some(self.scope(Scope { parent: from.parent, items: from.items.clone(), merged: HashMap::new() }))
    }

    fn bind_function(
        &mut self,
        factor: &TableFactor,
        name: Option<&ObjectName>,
        alias: Option<&TableAlias>,
        from: &mut From,
    ) -> Node {
        let scope = self.siblings(from).unwrap_or_default();
        let place = Place { scope, env: from.env, reader: from.reader };
        let own = name.and_then(reference).map(|(_, name)| name);
        let alias = alias.map(|alias| fold(&alias.name)).or(own);
        from.items.push(Item { alias, schema: None, columns: Vec::new(), open: true });
        Node::Loose(Box::new(factor.clone()), place)
    }

    /// A CTE, a view or a table.
    pub fn bind_relation(&mut self, name: &ObjectName, from: &From) -> Result<(Node, Item), GivenUp> {
        let key = reference(name).ok_or_else(|| GivenUp(format!("the name `{name}` is not understood")))?;
        if key.0.is_none()
            && let Some(node) = self.bind_cte(&key.1, from)?
        {
            return Ok(node);
        }
        let relation = self.known.relations.get(&key).cloned();
        let relation = relation.ok_or_else(|| GivenUp(format!("`{name}` is no table or view that we know")))?;
        let schema = relation.name.schema().to_owned();
        match &relation.nature {
            Nature::Table => {
                let occurrence = self.occurrence(relation, from.reader)?;
                let item = self.item(&occurrence, &key.1, Some(&schema));
                Ok((Node::Table(occurrence), item))
            }
            Nature::View { query, invoker } => {
                // A view that reads as its invoker does so for the caller, also inside a view that does not.
                let reader = if *invoker { Reader::Caller } else { Reader::Owner };
                let bound = self.deeper(|this| this.bind_query(query, None, None, reader))?;
                let mut item = bound.item(Some(key.1));
                item.schema = Some(schema);
                if item.open || item.columns.len() != relation.columns.len() {
                    return Err(GivenUp(format!("the columns of view `{name}` are not understood")));
                }
                for (column, known) in item.columns.iter_mut().zip(&relation.columns) {
                    column.0.clone_from(&known.name);
                }
                Ok((Node::Derived(Box::new(bound)), item))
            }
        }
    }

    fn bind_cte(&mut self, name: &str, from: &From) -> Result<Option<(Node, Item)>, GivenUp> {
        let mut next = from.env;
        while let Some(id) = next {
            let env = &self.envs[id];
            if env.name != name {
                next = env.parent;
                continue;
            }
            let Some(query) = env.query.clone() else {
                let item = Item { alias: Some(name.to_owned()), schema: None, columns: Vec::new(), open: true };
                return Ok(Some((Node::Nothing, item)));
            };
            let (inside, recursive, aliases, scope) = (env.inside, env.recursive, env.aliases.clone(), env.scope);
            // Each use is looked at on its own, as if it were written in place.
            let mut bound = self.deeper(|this| this.bind_query(&query, scope, inside, from.reader))?;
            if recursive {
                bound.forget_outputs(self);
            }
            let mut item = bound.item(Some(name.to_owned()));
            for (column, alias) in item.columns.iter_mut().zip(aliases) {
                column.0 = alias;
            }
            return Ok(Some((Node::Derived(Box::new(bound)), item)));
        }
        Ok(None)
    }

    /// The equalities that hold for every combination of rows that this part of FROM yields.
    pub fn collected(&self, node: &Node) -> Vec<Equality> {
        match node {
            Node::Nothing | Node::Loose(..) => Vec::new(),
            Node::Table(occurrence) => occurrence.left.clone(),
            Node::Derived(bound) => bound.collected(self),
            Node::Join(join) => match join.kind {
                JoinKind::Inner => {
                    let mut all = self.collected(&join.left);
                    all.extend(self.collected(&join.right));
                    all.extend(join.on.iter().cloned());
                    all
                }
                JoinKind::Left => self.collected(&join.left),
                JoinKind::Right => self.collected(&join.right),
                JoinKind::Full => Vec::new(),
            },
        }
    }

    /// `outer`: what holds around the whole FROM list, where nothing of it may be believed.
    pub fn settle_node(&mut self, node: &Node, context: &Context, outer: &Context) -> Result<(), GivenUp> {
        match node {
            Node::Nothing => Ok(()),
            Node::Table(occurrence) => self.settle(occurrence, context),
            Node::Derived(bound) => self.deeper(|this| this.settle_query(bound, context)),
            Node::Loose(factor, place) => self.subqueries(&**factor, place, context),
            Node::Join(join) => self.settle_join(join, context, outer),
        }
    }

    fn settle_join(&mut self, join: &Join, context: &Context, outer: &Context) -> Result<(), GivenUp> {
        let with_on = || widen(context, join.on.iter().cloned());
        let nullable = |this: &Self, side: &Node| widen(&with_on(), this.collected(side));
        let Join { left, right, .. } = join;
        let believed = match join.kind {
            JoinKind::Inner => {
                self.settle_node(left, context, outer)?;
                self.settle_node(right, context, outer)?;
                Rc::clone(context)
            }
            JoinKind::Left => {
                self.settle_node(left, context, outer)?;
                self.settle_node(right, &nullable(self, right), outer)?;
                with_on()
            }
            JoinKind::Right => {
                self.settle_node(left, &nullable(self, left), outer)?;
                self.settle_node(right, context, outer)?;
                with_on()
            }
            JoinKind::Full => {
                for side in [left, right] {
                    let own = widen(outer, self.collected(side));
                    self.settle_node(side, &own, outer)?;
                }
                Rc::clone(outer)
            }
        };
        match &join.condition {
            Some(condition) => self.filter(condition, &join.place, &believed),
            None => Ok(()),
        }
    }
}

fn join(kind: JoinKind, left: Node, right: Node, on: Vec<Equality>, condition: Option<Expr>, place: Place) -> Node {
    Node::Join(Box::new(Join { kind, left, right, on, condition, place }))
}

/// A name merged on two sides has no single meaning.
fn merge(into: &mut HashMap<String, Option<Var>>, more: HashMap<String, Option<Var>>) {
    for (name, var) in more {
        into.entry(name).and_modify(|known| *known = None).or_insert(var);
    }
}

fn join_kind(operator: &JoinOperator) -> Result<(JoinKind, &JoinConstraint), GivenUp> {
    Ok(match operator {
        JoinOperator::Join(constraint) | JoinOperator::Inner(constraint) | JoinOperator::CrossJoin(constraint) => {
            (JoinKind::Inner, constraint)
        }
        JoinOperator::Left(constraint) | JoinOperator::LeftOuter(constraint) => (JoinKind::Left, constraint),
        JoinOperator::Right(constraint) | JoinOperator::RightOuter(constraint) => (JoinKind::Right, constraint),
        JoinOperator::FullOuter(constraint) => (JoinKind::Full, constraint),
        _ => return Err(GivenUp("a join that PostgreSQL does not have".into())),
    })
}

fn using_column(name: &ObjectName) -> Result<String, GivenUp> {
    match reference(name) {
        Some((None, column)) => Ok(column),
        _ => Err(GivenUp(format!("USING ({name}) is not understood"))),
    }
}

fn rename(item: &mut Item, alias: Option<&TableAlias>) -> Result<(), GivenUp> {
    let Some(alias) = alias else { return Ok(()) };
    if alias.at.is_some() {
        return Err(GivenUp(format!("the alias `{alias}` is not understood")));
    }
    item.alias = Some(fold(&alias.name));
    item.schema = None;
    for (column, name) in item.columns.iter_mut().zip(&alias.columns) {
        column.0 = fold(&name.name);
    }
    Ok(())
}
