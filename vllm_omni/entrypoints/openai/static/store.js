// What is kept in this browser (IndexedDB): the gallery's pictures and videos, and runs that are not done yet. A record is
// {id, created, blob, fields, images, model, seconds, receipt}: `fields` and `images` make the same again. A run is
// {id, created, tab, kind, job, fields, images}; `job` is the id of a video that the server has taken.

const NAME = "vllm-omni";
const PICTURES = "pictures";
const RUNS = "jobs";
let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(PICTURES, { keyPath: "id", autoIncrement: true });
      request.result.createObjectStore(RUNS, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function inStore(name, mode, act) {
  const transaction = (await open()).transaction(name, mode);
  const request = act(transaction.objectStore(name));
  await ended(transaction);
  return request.result;
}

const ended = (transaction) =>
  new Promise((resolve, reject) => {
    transaction.oncomplete = resolve;
    transaction.onabort = transaction.onerror = () => reject(transaction.error);
  });

/**
 * Keep the records of a run, and the run no more; each record gets its id. Nothing is kept twice: of two tabs that follow
 * one job, the first keeps its video.
 */
export async function keep(records, runId) {
  const transaction = (await open()).transaction([PICTURES, RUNS], "readwrite");
  const [pictures, runs] = [PICTURES, RUNS].map((name) => transaction.objectStore(name));
  runs.getKey(runId).onsuccess = ({ target }) => {
    if (target.result === undefined) return;
    runs.delete(runId);
    for (const record of records) pictures.add(record).onsuccess = (added) => (record.id = added.target.result);
  };
  await ended(transaction);
}

export const remove = (id) => inStore(PICTURES, "readwrite", (store) => store.delete(id));
export const clear = () => inStore(PICTURES, "readwrite", (store) => store.clear());
export const count = () => inStore(PICTURES, "readonly", (store) => store.count());

export const putRun = (run) => inStore(RUNS, "readwrite", (store) => store.put(run));
export const removeRun = (id) => inStore(RUNS, "readwrite", (store) => store.delete(id));
export const runs = () => inStore(RUNS, "readonly", (store) => store.getAll());

/** At most `number` records with an id below `before`, the newest first. */
export async function older(before, number) {
  const transaction = (await open()).transaction(PICTURES, "readonly");
  const range = before === null ? null : IDBKeyRange.upperBound(before, true);
  const request = transaction.objectStore(PICTURES).openCursor(range, "prev");
  const records = [];
  return new Promise((resolve, reject) => {
    request.onerror = () => reject(request.error);
    request.onsuccess = () => {
      const cursor = request.result;
      if (cursor === null || records.length === number) return resolve(records);
      records.push(cursor.value);
      cursor.continue();
    };
  });
}
