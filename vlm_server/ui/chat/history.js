/**
 * Conversations, in memory and, as well as the browser lets us, in IndexedDB: pictures are too big for localStorage.
 *
 * A conversation is `{id, title, isNamed, updated, turns}`; a turn of the user has `text` and `pictures` (`{id, name, type, size}`), an
 * answer has `text`, `status` and what it cost. The pictures' bytes lie beside them as blobs. Whatever fails here is told once to
 * `onTrouble`, and the chat goes on in memory.
 */

const NAME = "vlm-server.chat";
const VERSION = 1;
const OPEN_LIMIT_MS = 5000;

export class History {
  #database = null;
  #conversations = new Map();
  #blobs = new Map();
  #onTrouble;

  constructor(onTrouble) {
    this.#onTrouble = onTrouble;
  }

  /** Reads what is kept; resolves in any case. */
  async open() {
    try {
      this.#database = await opened();
      const kept = await finished(this.#database.transaction("conversations").objectStore("conversations").getAll());
      for (const conversation of kept) this.#conversations.set(conversation.id, conversation);
    } catch (error) {
      this.#fail(error);
    }
  }

  /** The latest first. */
  list() {
    return [...this.#conversations.values()].sort((a, b) => b.updated - a.updated);
  }

  get(id) {
    return this.#conversations.get(id);
  }

  async save(conversation) {
    this.#conversations.set(conversation.id, conversation);
    await this.#write(["conversations"], (stores) => stores.conversations.put(structuredClone(conversation)));
  }

  async addPicture(conversationId, picture, blob) {
    this.#blobs.set(picture.id, blob);
    await this.#write(["pictures"], (stores) =>
      stores.pictures.put({ id: picture.id, conversation: conversationId, blob }),
    );
  }

  /** The picture's bytes; undefined where they are lost. */
  async blob(id) {
    if (!this.#blobs.has(id) && this.#database) {
      try {
        const kept = await finished(this.#database.transaction("pictures").objectStore("pictures").get(id));
        if (kept) this.#blobs.set(id, kept.blob);
      } catch (error) {
        this.#fail(error);
      }
    }
    return this.#blobs.get(id);
  }

  /** Forgets pictures that no turn shows any more. */
  async removePictures(ids) {
    for (const id of ids) this.#blobs.delete(id);
    await this.#write(["pictures"], (stores) => ids.forEach((id) => stores.pictures.delete(id)));
  }

  async remove(conversation) {
    this.#conversations.delete(conversation.id);
    for (const picture of picturesOf(conversation.turns)) this.#blobs.delete(picture.id);
    await this.#write(["conversations", "pictures"], ({ conversations, pictures }) => {
      conversations.delete(conversation.id);
      const cursor = pictures.index("conversation").openKeyCursor(conversation.id);
      cursor.onsuccess = () => {
        if (!cursor.result) return;
        pictures.delete(cursor.result.primaryKey);
        cursor.result.continue();
      };
    });
  }

  async #write(names, work) {
    if (!this.#database) return;
    try {
      const transaction = this.#database.transaction(names, "readwrite");
      work(Object.fromEntries(names.map((name) => [name, transaction.objectStore(name)])));
      await new Promise((resolve, reject) => {
        transaction.oncomplete = resolve;
        transaction.onabort = transaction.onerror = () => reject(transaction.error);
      });
    } catch (error) {
      this.#fail(error);
    }
  }

  #fail(error) {
    this.#onTrouble(
      error?.name === "QuotaExceededError"
        ? "the browser's space for this page is full"
        : "this browser allows no storage here",
    );
    this.#onTrouble = () => {};
  }
}

export const picturesOf = (turns) => turns.flatMap((turn) => turn.pictures ?? []);

function opened() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(NAME, VERSION);
    const limit = setTimeout(() => reject(new Error("IndexedDB does not answer")), OPEN_LIMIT_MS);
    request.onupgradeneeded = () => {
      request.result.createObjectStore("conversations", { keyPath: "id" });
      request.result.createObjectStore("pictures", { keyPath: "id" }).createIndex("conversation", "conversation");
    };
    request.onsuccess = () => {
      clearTimeout(limit);
      request.result.onversionchange = () => request.result.close(); // a newer page in another tab
      resolve(request.result);
    };
    request.onerror = () => reject(request.error);
  });
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}
