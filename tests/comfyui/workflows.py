"""Workflows as ComfyUI's page saves them -> prompts as its API takes them, which its page does in a browser."""


def to_prompt(workflow: dict, nodes: dict) -> dict:
    """
    Args:
        workflow: with `nodes` and `links`.
        nodes: what ComfyUI answers under /object_info.
    """
    links = {link[0]: [str(link[1]), link[2]] for link in workflow["links"]}
    return {str(node["id"]): _to_api(node, nodes[node["type"]], links) for node in workflow["nodes"]}


def _to_api(node: dict, definition: dict, links: dict) -> dict:
    connected = {entry["name"]: links[entry["link"]] for entry in node["inputs"] if entry["link"] is not None}
    inputs, values = {}, iter(node["widgets_values"])
    for name, (kind, *options) in _inputs(definition):
        if name in connected:
            inputs[name] = connected[name]
        elif isinstance(kind, list) or kind in ("INT", "FLOAT", "STRING", "COMBO", "BOOLEAN"):
            inputs[name] = next(values)
            if options and options[0].get("control_after_generate"):
                assert next(values) in ("fixed", "randomize", "increment", "decrement")
            if options and options[0].get("image_upload"):
                assert next(values) == "image"
    assert not list(values)
    return {"class_type": node["type"], "inputs": inputs}


def _inputs(definition: dict):
    for group in ("required", "optional"):
        for name in definition["input_order"].get(group, []):
            yield name, definition["input"][group][name]
