-- Lists go by name, byte for byte, a page at a time: from this index, whatever the number of prompts and the database's
-- collation. prompt_name_key is in the collation, so that a page needed all names sorted.
CREATE INDEX prompt_name_idx ON prompt (project_id, name COLLATE "C");
