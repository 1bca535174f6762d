"""What a reference names: files, folders by the frameworks' rules, and the Hugging Face cache. See weightd.resolve."""
