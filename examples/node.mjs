// Steps one environment from Node, with nothing but its own fetch; a step is safe to send again.
//   node examples/node.mjs http://127.0.0.1:8000
const url = process.argv[2] ?? "http://127.0.0.1:8000";
const session = `node-${process.pid}-${Date.now()}`;
const policy = await (await fetch(`${url}/policy`)).json();

async function act(step, observation) {
  const body = JSON.stringify({
    session_id: session, episode: "1", step, episode_start: step === 0, observation,
  });
  const headers = { "Content-Type": "application/json", "X-Session-Id": session };
  for (let attempt = 0; ; attempt++) {
    try {
      const response = await fetch(`${url}/act`, { method: "POST", headers, body });
      const answer = await response.json();
      if (response.ok) return answer;
      if (![429, 503, 504].includes(response.status) || attempt === 8) {
        throw new Error(`${response.status} ${answer.error_type}: ${answer.error}`);
      }
    } catch (error) {
      if (!(error instanceof TypeError) || attempt === 8) throw error; // no answer at all
    }
    await new Promise((resolve) => setTimeout(resolve, 50 * 2 ** attempt));
  }
}

let observation = new Array(policy.spec.observation_dim).fill(0);
for (let step = 0; step < 5; step++) {
  const { action, value } = await act(step, observation);
  console.log(step, JSON.stringify(action), value.toFixed(4));
  observation = observation.map(() => Math.random() - 0.5); // what your environment shows next
}
await fetch(`${url}/sessions/${session}`, { method: "DELETE" });
