"""Names of the files in a folder that rsoups writes."""

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MANIFEST_FILE = "lineage.json"
SOUP_FILE = "soup.json"  # the manifest of a soup
CARD_FILE = "README.md"
FRONT_FILE = "front.json"
PICTURE_FILE = "front.png"
