//! Corrections to every schema of the document.

use utoipa::openapi::schema::{AdditionalProperties, ArrayItems, KnownFormat, SchemaFormat};
use utoipa::openapi::{Components, OpenApi, Ref, RefOr, Schema};

use crate::http::openapi::operations;

/// Prefix of the schemas of pages: `Page_Ensemble` is a page of `Ensemble`.
const PAGE: &str = "Page_";

/// Makes every page refer to the schema of its items, which the library repeats in each page.
pub(super) fn name_items(document: &mut OpenApi) {
    let schemas = &mut document.components.get_or_insert_default().schemas;
    let names: Vec<String> = schemas.keys().cloned().collect();
    for item in names.iter().filter_map(|name| name.strip_prefix(PAGE)) {
        let page = schemas.get_mut(&format!("{PAGE}{item}"));
        if let Some(RefOr::T(Schema::Object(page))) = page
            && let Some(RefOr::T(Schema::Array(items))) = page.properties.get_mut("items")
            && names.iter().any(|name| name == item)
        {
            let named = RefOr::Ref(Ref::from_schema_name(item));
            items.items = ArrayItems::RefOrSchema(Box::new(named));
        }
    }
}

/// Replaces the formats of integers by `int32` or `int64`, the ones of OpenAPI's registry that generators know.
/// Unsigned integers keep their minimum of 0.
pub(super) fn register_formats(document: &mut OpenApi) {
    each(document, &mut |schema| {
        let RefOr::T(Schema::Object(schema)) = schema else {
            return;
        };
        let Some(SchemaFormat::KnownFormat(format)) = &mut schema.format else {
            return;
        };
        *format = match format {
            KnownFormat::Int8 | KnownFormat::Int16 | KnownFormat::UInt8 | KnownFormat::UInt16 => {
                KnownFormat::Int32
            }
            KnownFormat::UInt32 | KnownFormat::UInt64 => KnownFormat::Int64,
            _ => return,
        };
    });
}

/// Passes every schema of the document, nested ones included, to `change`.
fn each(document: &mut OpenApi, change: &mut dyn FnMut(&mut RefOr<Schema>)) {
    if let Some(Components { schemas, .. }) = &mut document.components {
        schemas
            .values_mut()
            .for_each(|schema| within(schema, change));
    }
    for (_, _, operation) in operations(document) {
        for parameter in operation.parameters.iter_mut().flatten() {
            if let RefOr::T(parameter) = parameter {
                parameter
                    .schema
                    .iter_mut()
                    .for_each(|it| within(it, change));
            }
        }
        let bodies = operation
            .request_body
            .iter_mut()
            .flat_map(|body| match body {
                RefOr::T(body) => Some(body.content.values_mut()),
                RefOr::Ref(_) => None,
            });
        for content in bodies.flatten() {
            if let RefOr::T(content) = content {
                content.schema.iter_mut().for_each(|it| within(it, change));
            }
        }
        for response in operation.responses.responses.values_mut() {
            let RefOr::T(response) = response else {
                continue;
            };
            for content in response.content.values_mut() {
                if let RefOr::T(content) = content {
                    content.schema.iter_mut().for_each(|it| within(it, change));
                }
            }
            for header in response.headers.values_mut() {
                if let RefOr::T(header) = header {
                    header.schema.iter_mut().for_each(|it| within(it, change));
                }
            }
        }
    }
}

fn within(schema: &mut RefOr<Schema>, change: &mut dyn FnMut(&mut RefOr<Schema>)) {
    change(schema);
    let RefOr::T(schema) = schema else {
        return;
    };
    match schema {
        Schema::Object(object) => {
            object
                .properties
                .values_mut()
                .for_each(|it| within(it, change));
            if let Some(AdditionalProperties::RefOr(values)) =
                object.additional_properties.as_deref_mut()
            {
                within(values, change);
            }
        }
        Schema::Array(array) => {
            if let ArrayItems::RefOrSchema(items) = &mut array.items {
                within(items, change);
            }
        }
        Schema::OneOf(one_of) => one_of.items.iter_mut().for_each(|it| within(it, change)),
        Schema::AllOf(all_of) => all_of.items.iter_mut().for_each(|it| within(it, change)),
        Schema::AnyOf(any_of) => any_of.items.iter_mut().for_each(|it| within(it, change)),
        _ => {}
    }
}
