// What is kept in this browser (IndexedDB): the gallery's pictures and videos, and jobs that were not done yet. A record is
// {id, created, blob, fields, images, model, seconds, receipt}: `fields` and `images` make the same again. A job is
// {id, fields, images}.

const NAME = "vllm-omni";
const PICTURES = "pictures";
const JOBS = "jobs";
let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(PICTURES, { keyPath: "id", autoIncrement: true });
      request.result.createObjectStore(JOBS, { keyPath: "id" });
    };
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function inStore(name, mode, act) {
  const transaction = (await open()).transaction(name, mode);
  const request = act(transaction.objectStore(name));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request.error);
  });
}

/** Keep a record; returns its id. */
export const add = (record) => inStore(PICTURES, "readwrite", (store) => store.add(record));
export const remove = (id) => inStore(PICTURES, "readwrite", (store) => store.delete(id));
export const clear = () => inStore(PICTURES, "readwrite", (store) => store.clear());
export const count = () => inStore(PICTURES, "readonly", (store) => store.count());

export const addJob = (job) => inStore(JOBS, "readwrite", (store) => store.put(job));
export const removeJob = (id) => inStore(JOBS, "readwrite", (store) => store.delete(id));
export const jobs = () => inStore(JOBS, "readonly", (store) => store.getAll());

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
