// Makes the calls that stdin lists with the official client and prints what each gave, as JSON.
// {"host", "headers", "together": bool, "calls": [{"method", "request", "leave_after": parts?}]}
import { Ollama } from 'ollama'

const chunks = []
for await (const chunk of process.stdin) chunks.push(chunk)
const { host, headers, together, calls } = JSON.parse(Buffer.concat(chunks))
const client = new Ollama({ host, headers })

async function make({ method, request, leave_after }) {
  const parts = []
  try {
    const got = await (request === undefined ? client[method]() : client[method](request))
    if (!request?.stream) return { answer: got }
    for await (const part of got) {
      parts.push(part)
      if (parts.length === leave_after) got.abort()
    }
    return { parts }
  } catch (error) {
    return { parts, error: error.message, name: error.name, status: error.status_code }
  }
}

const given = []
if (together) given.push(...(await Promise.all(calls.map(make))))
else for (const call of calls) given.push(await make(call))
process.stdout.write(JSON.stringify(given))
