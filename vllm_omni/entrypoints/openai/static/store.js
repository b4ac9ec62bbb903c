// The gallery's pictures, kept in this browser (IndexedDB). A record is
// {id, created, blob, fields, images, model, seconds, receipt}: `fields` and `images` make the same picture again.

const NAME = "vllm-omni";
const PICTURES = "pictures";
let opening = null;

function open() {
  opening ??= new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => request.result.createObjectStore(PICTURES, { keyPath: "id", autoIncrement: true });
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
  return opening;
}

async function inStore(mode, act) {
  const transaction = (await open()).transaction(PICTURES, mode);
  const request = act(transaction.objectStore(PICTURES));
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve(request.result);
    transaction.onabort = transaction.onerror = () => reject(transaction.error ?? request.error);
  });
}

/** Keep a record; returns its id. */
export const add = (record) => inStore("readwrite", (store) => store.add(record));
export const remove = (id) => inStore("readwrite", (store) => store.delete(id));
export const clear = () => inStore("readwrite", (store) => store.clear());
export const count = () => inStore("readonly", (store) => store.count());

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
