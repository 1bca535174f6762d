"""Find the files of a reference: a file, a folder or a repository in the Hugging Face cache. See weightd.resolve."""
