// Builds elements. Used by whatever draws. Text goes in as text: no row of the database is ever read as markup.

const SVG = 'http://www.w3.org/2000/svg'

/** `el('p', { class: 'quiet' }, 'text', child)`; an attribute or child that is null or false is left out; children may nest. */
export const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children)

export const svg = (name, attributes = {}, ...children) => fill(document.createElementNS(SVG, name), attributes, children)

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes)) {
    if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value === true ? '' : String(value))
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false))
  return node
}
