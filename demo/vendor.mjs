// Copies the unmodified supabase-js bundle to where the page is served from. Run by `npm ci` and `npm run vendor`.
// Never changes the file: the page shows what a stock client does.
import { copyFile, mkdir } from 'node:fs/promises'

const from = new URL('node_modules/@supabase/supabase-js/dist/umd/supabase.js', import.meta.url)
const folder = new URL('page/vendor/', import.meta.url)

await mkdir(folder, { recursive: true })
await copyFile(from, new URL('supabase.js', folder))
console.log('demo/page/vendor/supabase.js is in place')
