"use strict";
// Everything from the server is put in as text (textContent), never as HTML.
const at = (id) => document.getElementById(id);
const COUNT = 10;
// Log-probabilities at which the next colour begins: a ten-thousandth, a thousandth, a hundredth, 4 %, 15 %, a half.
const LEVELS = [-9.2, -6.9, -4.6, -3.2, -1.9, -0.7];
let key = "";
let asked = 0;

function make(name, className, text) {
  const element = document.createElement(name);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function say(text) {
  at("status").textContent = text;
}

async function ask(path, body) {
  const headers = {};
  if (key) headers.authorization = `Bearer ${key}`;
  if (body) headers["content-type"] = "application/json";
  const reply = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  const found = await reply.json();
  if (reply.ok) return found;
  const error = new Error(found.error ? found.error.message : reply.statusText);
  error.status = reply.status;
  throw error;
}

function fail(error) {
  at("key-form").hidden = error.status !== 401;
  if (error.status === 401) at("key").focus();
  say(error.status ? `${error.message}.` : "The server does not answer.");
}

function signed(value, digits) {
  return value.toFixed(digits).replace("-", "−");
}

function tokens(list) {
  const line = make("div", "tokens");
  line.setAttribute("role", "group");
  line.setAttribute("aria-label", "Log-probability of each part of the query");
  const joined = [];
  for (const { text, log_prob } of list) {
    // A token without text goes on with the character that the one before it begins.
    if (text || !joined.length) joined.push({ text, log_prob });
    else joined[joined.length - 1].log_prob += log_prob;
  }
  for (const { text, log_prob } of joined) {
    const level = LEVELS.filter((limit) => log_prob >= limit).length;
    const token = make("span", `l${level}`, text.trim() || "␣");
    token.append(make("small", "", signed(log_prob, 1)));
    line.append(token);
  }
  return line;
}

function fact(name, value, digits) {
  const part = make("span", "", `${name} `);
  part.append(make("b", "", signed(value, digits)));
  return part;
}

// Whether the re-ranker's score is a log-probability, which has a part for each token of the query.
let explains = false;

function hit(entry, query) {
  const item = make("li");
  item.tabIndex = -1;
  item.append(make("h2", "", entry.title), make("p", "snippet", entry.snippet));
  const facts = make("div", "facts");
  facts.append(fact("similarity", entry.score, 3));
  if (entry.rerank_score !== undefined) {
    facts.append(explains
      ? fact("log-probability of the query", entry.rerank_score, 1) : fact("re-ranker", entry.rerank_score, 3));
  }
  item.append(facts);
  if (entry.tokens) item.append(tokens(entry.tokens));
  else if (explains && entry.text) {
    const why = make("button", "quiet", "Why?");
    why.type = "button";
    why.setAttribute("aria-label", `Why is this found: ${entry.title}`);
    why.addEventListener("click", async () => {
      why.disabled = true;
      try {
        const body = { query, documents: [entry.text], return_tokens: true, raw_scores: true };
        const [result] = (await ask("rerank", body)).results;
        facts.insertBefore(fact("log-probability of the query", result.relevance_score, 1), why);
        why.remove();
        item.append(tokens(result.tokens));
        at("legend").hidden = false;
      } catch (error) {
        why.disabled = false;
        fail(error);
      }
    });
    facts.append(why);
  }
  facts.append(make("span", "id", entry.id));
  return item;
}

async function search() {
  const query = at("query").value.trim();
  if (!query) return;
  const number = ++asked;
  const reranks = at("rerank").checked;
  say(reranks ? "Searching and re-ranking …" : "Searching …");
  const begin = performance.now();
  try {
    const body = { query, k: COUNT, return_documents: true };
    if (reranks) Object.assign(body, { rerank: COUNT, return_tokens: explains });
    const found = await ask("search", body);
    if (number !== asked) return; // another search has begun meanwhile
    at("hits").replaceChildren(...found.hits.map((entry) => hit(entry, query)));
    at("legend").hidden = !reranks || !explains;
    at("key-form").hidden = true;
    const seconds = (performance.now() - begin) / 1000;
    const parts = reranks
      ? ` (search ${found.seconds.search.toFixed(2)} s, re-ranking ${found.seconds.rerank.toFixed(2)} s)` : "";
    say(`${found.hits.length} of ${found.documents.toLocaleString("en")} documents in ${seconds.toFixed(2)} s${parts}`);
    document.title = `${query} – Search`;
    // Behind #, so that a link keeps the search and no server's log sees it.
    history.replaceState(null, "", `#${new URLSearchParams({ q: query, ...(reranks && { rerank: 1 }) })}`);
  } catch (error) {
    if (number === asked) fail(error);
  }
}

async function begin() {
  try {
    const info = await ask("info");
    at("key-form").hidden = true;
    at("switch").hidden = !info.cross_encoder;
    explains = info.explains;
    at("about").textContent = [info.model_id, info.documents && `${info.documents.toLocaleString("en")} documents`]
      .filter(Boolean).join(", ");
    const where = new URLSearchParams(location.hash.slice(1));
    at("rerank").checked = where.has("rerank") && Boolean(info.cross_encoder);
    at("query").value = at("query").value || where.get("q") || "";
    if (!info.documents) return say("This server has no index; start it with --index.");
    say("");
    search();
  } catch (error) {
    fail(error);
    if (error.status === 503) {
      say("The model is being loaded …");
      setTimeout(begin, 2000);
    }
  }
}

at("search").addEventListener("submit", (event) => { event.preventDefault(); search(); });
at("rerank").addEventListener("change", search);
at("key-form").addEventListener("submit", (event) => {
  event.preventDefault();
  key = at("key").value;
  at("key").value = "";
  begin();
});
document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("input:not([type=checkbox])")) return;
  const step = { j: 1, k: -1 }[event.key];
  if (event.key === "/") at("query").focus();
  else if (step) {
    const items = [...at("hits").children];
    const now = items.indexOf(document.activeElement.closest("li"));
    const next = items[Math.min(items.length - 1, Math.max(0, now + step))];
    if (next) next.focus();
  } else return;
  event.preventDefault();
});
begin();
